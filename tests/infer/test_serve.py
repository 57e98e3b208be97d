"""The endpoint through OpenAI's own client and through rude ones, over a small random model."""

import asyncio
import json
import random
import threading
import time

import jax
import numpy as np
import pytest

pytest.importorskip("openai", reason="openai is not installed: pip install '.[eval]'")

import httpx
import openai
import uvicorn
from starlette.testclient import TestClient

from lemur_jax.agents.episodes import endpoint_agent
from lemur_jax.common.errors import UserError
from lemur_jax.infer import serve
from lemur_jax.infer.complete import complete
from lemur_jax.infer.generate import generate
from lemur_jax.infer.score import score
from lemur_jax.infer.serve import application, listen
from lemur_jax.infer.session import load
from lemur_jax.models import decoder
from lemur_jax.models.decoder import Compute
from lemur_jax.parallel.mesh import parse_mesh
from lemur_jax.text.chat_template import render_chat


@pytest.fixture(scope="module")
def session(chat_model):
    return load(chat_model, parse_mesh("fsdp=1"), "float32", devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def url(session):
    started = threading.Event()

    class Server(uvicorn.Server):
        async def startup(self, sockets=None):
            await super().startup(sockets)
            started.set()

    app = application(session, "tiny", ("127.0.0.1", "localhost"))
    server = Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    assert started.wait(60)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/v1"
    server.should_exit = True
    thread.join()
    app.state.worker.stop()


@pytest.fixture(scope="module")
def client(url):
    return openai.OpenAI(base_url=url, api_key="none", max_retries=0)


@pytest.mark.parametrize("port", [-1, 80_000, 10**9, "taken"])
def test_an_address_that_cannot_be_had_is_named(port):
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1] if port == "taken" else port
        with pytest.raises(UserError, match=f"cannot listen on 127.0.0.1 port {port} .*--port"):
            listen("127.0.0.1", port)


def test_models(client):
    assert [model.id for model in client.models.list()] == ["tiny"]


def test_completions_with_logprobs(client, session):
    options = {"model": "tiny", "temperature": 0, "max_tokens": 8, "logprobs": 1}
    answer = client.completions.create(prompt="def f(x):", **options)
    choice = answer.choices[0]
    assert choice.finish_reason == "length"
    assert answer.usage.completion_tokens == len(choice.logprobs.tokens) == 8
    # The same again as ids, together with another; echoed, and scored by the prompt's own program.
    tokenizer = session.tokenizer
    prompt = [tokenizer.bos_id, *tokenizer.encode("def f(x):")]
    both = client.completions.create(prompt=[prompt, [1, 5]], **options)
    assert both.choices[0].text == choice.text
    echoed = client.completions.create(prompt=prompt, **options, echo=True).choices[0]
    assert echoed.text.startswith("def f(x):")
    assert echoed.logprobs.token_logprobs[0] is None
    expected = score(session, [(prompt[:1], prompt[1:])])[0].logprobs
    np.testing.assert_allclose(echoed.logprobs.token_logprobs[1 : len(prompt)], expected, atol=1e-5)


def reference(session, ids):
    """Log-probabilities [T, V] at every position, by the model's plain forward pass."""
    tokens = np.array([ids])
    positions, segments = np.arange(len(ids))[None], np.ones_like(tokens)
    params = jax.tree.map(jax.numpy.asarray, jax.device_get(session.params))
    logits = decoder.forward(session.model, Compute(), params, tokens, positions, segments)
    return np.asarray(jax.nn.log_softmax(logits[0], axis=-1))


def test_top_logprobs(client, session):
    tokenizer = session.tokenizer
    prompt = [tokenizer.bos_id, *tokenizer.encode("def f(x):")]
    options = {"model": "tiny", "prompt": prompt, "temperature": 0, "max_tokens": 6}
    told = client.completions.create(**options, logprobs=3, echo=True).choices[0].logprobs
    assert told.top_logprobs[0] is None
    assert len(told.top_logprobs) == len(told.tokens) == len(prompt) + 6
    ids = [*prompt, *greedy(session, prompt, 6)]
    expected = reference(session, ids)
    for place, top in enumerate(told.top_logprobs[1:]):
        best = np.argsort(-expected[place])[:3]
        assert list(top) == [tokenizer.token(int(token)) for token in best]
        np.testing.assert_allclose(list(top.values()), expected[place][best], atol=1e-4)
    # What was generated greedily is the likeliest, to the last bit: harnesses compare so.
    for value, top in list(zip(told.token_logprobs, told.top_logprobs, strict=True))[len(prompt) :]:
        assert value == max(top.values())
    assert client.completions.create(**options, logprobs=0).choices[0].logprobs.top_logprobs is None


def greedy(session, prompt, count):
    (found,) = generate(session, [prompt], max_new_tokens=count, stop_ids=())
    return found.tokens


def test_several_answers(client):
    options = {"model": "tiny", "temperature": 2.0, "max_tokens": 8, "seed": 5}
    answer = client.completions.create(prompt=["a b", "c d"], n=3, **options)
    assert [choice.index for choice in answer.choices] == list(range(6))
    assert len({choice.text for choice in answer.choices[:3]}) == 3
    assert answer.usage.completion_tokens <= 6 * 8
    once = client.completions.create(prompt=["a b", "c d"], **options)
    assert answer.usage.prompt_tokens == once.usage.prompt_tokens  # OpenAI counts a prompt once
    alone = client.completions.create(prompt="a b", **options)
    assert alone.choices[0].text == answer.choices[0].text
    options |= {"messages": [{"role": "user", "content": "hi"}], "n": 2, "logprobs": True, "top_logprobs": 2}
    several = client.chat.completions.create(**options)
    assert several.choices[0].message.content != several.choices[1].message.content
    for choice in several.choices:
        for entry in choice.logprobs.content:
            first, second = entry.top_logprobs
            assert first.logprob >= second.logprob


def test_stop_and_stream(client):
    options = {"model": "tiny", "prompt": "def f(x):", "temperature": 0, "max_tokens": 24}
    text = client.completions.create(**options).choices[0].text
    stop = text[4:6]
    cut = client.completions.create(**options, stop=stop).choices[0]
    assert (cut.text, cut.finish_reason) == (text[: text.index(stop)], "stop")
    for changes, expected in (({}, text), ({"stop": [stop]}, cut.text)):
        pieces = [chunk.choices[0] for chunk in client.completions.create(**options, **changes, stream=True)]
        assert "".join(piece.text for piece in pieces) == expected
        assert pieces[-1].finish_reason == ("stop" if changes else "length")


def test_chat(client, url):
    options = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "temperature": 0}
    answer = client.chat.completions.create(**options, max_tokens=12, logprobs=True)
    choice = answer.choices[0]
    assert choice.message.role == "assistant"
    assert len(choice.logprobs.content) == answer.usage.completion_tokens
    pieces = client.chat.completions.create(**options, max_tokens=12, stream=True)
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == choice.message.content
    agent = endpoint_agent(url, "tiny", max_new_tokens=12)
    assert agent(options["messages"]) == choice.message.content.strip()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n": 0}, "n is 0"),
        ({"n": 2, "best_of": 3}, "best_of must be the same"),
        ({"n": 2, "stream": True}, "one answer to one prompt"),
        ({"logprobs": 21}, "logprobs is 21"),
        ({"max_tokens": 1000}, "max_tokens is 1000"),
        ({"max_tokens": 128}, "more than the model's"),
        ({"temperature": -1}, "temperature is -1"),
        ({"prompt": []}, "prompt must be"),
        ({"prompt": [10**6]}, "outside the model's vocabulary"),
        ({"stream": True, "max_tokens": 1000}, "max_tokens is 1000"),
        ({"extra_body": {"max_completion_tokens": "x"}}, "max_completion_tokens is 'x'"),
        ({"temperature": 10**30}, "temperature is"),
        ({"prompt": "a" * 10_000}, "too many for the model's 128 tokens"),
        ({"prompt": ["a"] * 20, "n": 20}, "one request may have 256"),
    ],
)
def test_bad_requests(client, changes, message):
    with pytest.raises(openai.BadRequestError, match=message):
        client.completions.create(**({"model": "tiny", "prompt": "x"} | changes))


def test_requests_that_are_not_meant_for_this_server(url):
    body = json.dumps({"prompt": "x", "max_tokens": 1})
    kind = {"content-type": "application/json"}
    for headers, status in (
        (kind, 200),
        ({}, 200),
        (kind | {"host": "evil.example"}, 403),
        (kind | {"origin": "http://evil.example"}, 403),
        (kind | {"origin": "null"}, 403),
        ({"content-type": "text/plain"}, 415),
        ({"content-type": "application/x-www-form-urlencoded"}, 415),
    ):
        assert httpx.post(f"{url}/completions", content=body, headers=headers).status_code == status
    assert httpx.get(f"{url}/models", headers={"host": "evil.example:80"}).status_code == 403


def test_a_name_may_have_capitals(session):
    server = application(session, "tiny", ("MyHost", "localhost"))
    for host, status in (("MyHost:80", 200), ("myhost", 200), ("other", 403)):
        assert TestClient(server).get("/v1/models", headers={"host": host}).status_code == status


def test_only_the_first_part_of_a_stream_has_a_time_limit(session, monkeypatch):
    def slow(*_):
        monkeypatch.setattr(serve, "ANSWER_SECONDS", 0.0)  # the first part is waited for already
        yield "a", ""
        time.sleep(0.3)
        yield "b", "stop"

    monkeypatch.setattr(serve, "pieces", slow)
    server = TestClient(application(session, "tiny"))
    answer = server.post("/v1/completions", json={"prompt": "x", "stream": True})
    lines = answer.text.split("\n\n")
    assert [json.loads(line[6:])["choices"][0]["text"] for line in lines[:2]] == ["a", "b"]
    assert lines[2] == "data: [DONE]"


HUGE = b"1" + b"0" * 400
BROKEN = [
    b"", b"[]", b"nonsense", b"\xff\xfe", b"[" * 100_000, b'{"prompt": "x", "max_tokens": NaN}',
    b'{"prompt": "x", "seed": ' + HUGE + b"}", b'{"prompt": "x", "seed": 1' + b"0" * 5000 + b"}",
    b'{"prompt": "x", "temperature": ' + HUGE + b"}", b'{"prompt": "x", "temperature": 1e999}',
    b'{"prompt": "\\ud83d"}', b'{"prompt": "x", "stream": 1}', b'{"prompt": "x", "stop": [["y"]]}',
    b'{"prompt": "x", "logprobs": true}', b'{"prompt": {"a": 1}}', b'{"prompt": [[1], "x", [true]]}',
]  # fmt: skip


def test_broken_requests_are_refused_with_a_reason(url):
    for body in BROKEN:
        answer = httpx.post(f"{url}/completions", content=body)
        assert answer.status_code == 400, (body[:40], answer.text)
        assert answer.json()["error"]["message"]
    assert httpx.post(f"{url}/completions", content=b'{"prompt": "' + b"x" * (5 << 20)).status_code == 413
    image = [{"role": "user", "content": [{"type": "image"}]}]
    for messages in (None, 7, [], [7], [{}], [{"role": "x", "content": "x"}], image):
        answer = httpx.post(f"{url}/chat/completions", json={"messages": messages})
        assert answer.status_code == 400, (messages, answer.text)


def test_text_parts_tool_calls_and_rendered_chats(client, session):
    options = {"model": "tiny", "temperature": 0, "max_tokens": 4}
    turn = {"role": "user", "content": "hi"}
    plain = client.chat.completions.create(messages=[turn], **options)
    parts = [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]
    split = client.chat.completions.create(messages=[{"role": "user", "content": parts}], **options)
    assert split.choices[0].message.content == plain.choices[0].message.content
    function = {"name": "f", "arguments": "{}"}
    calls = [{"id": "1", "type": "function", "function": function}]
    call = {"role": "assistant", "content": None, "tool_calls": calls}
    result = {"role": "tool", "tool_call_id": "1", "content": "1"}
    assert client.chat.completions.create(messages=[turn, call, result], **options).usage.prompt_tokens > 20
    # The conversation as a client has rendered it: control tokens are themselves, and one bos is in front.
    text = render_chat(session.tokenizer, [turn], add_generation_prompt=True)
    rendered = client.completions.create(prompt=text, **options)
    assert rendered.usage.prompt_tokens == plain.usage.prompt_tokens + 1
    bos = session.tokenizer.token(session.tokenizer.bos_id)
    with_bos = client.completions.create(prompt=bos + text, **options)
    assert with_bos.usage.prompt_tokens == rendered.usage.prompt_tokens


async def ask(http, prompt, *, stream, leave=None):
    """The text of an answer; None if this client left after `leave` seconds, before the answer was whole."""

    async def whole():
        body = {"prompt": prompt, "max_tokens": 24, "temperature": 0, "stream": stream}
        if not stream:
            answer = await http.post("/completions", json=body)
            assert answer.status_code == 200, answer.text
            return answer.json()["choices"][0]["text"]
        text, finished = "", False
        async with http.stream("POST", "/completions", json=body) as answer:
            assert answer.status_code == 200
            async for line in answer.aiter_lines():
                if line.startswith("data: {"):
                    text += json.loads(line[6:])["choices"][0]["text"]
                finished |= line == "data: [DONE]"
        assert finished
        return text

    try:
        return await asyncio.wait_for(whole(), leave)
    except TimeoutError:
        assert leave is not None, "no answer"
        return None


async def crowd(url, expected, *, clients, seconds, seed):
    """Clients that ask again and again for a while, a third of them leaving at random moments; the answers counted."""
    rng = random.Random(seed)
    loop = asyncio.get_running_loop()
    end = loop.time() + seconds
    counts = {"answered": 0, "left": 0}
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    async with httpx.AsyncClient(base_url=url, timeout=None, limits=limits) as http:

        async def one(rude):
            while True:
                prompt, stream = rng.choice(list(expected)), rng.random() < 0.6
                text = await ask(http, prompt, stream=stream, leave=rng.uniform(0, 0.5) if rude else None)
                assert text in (expected[prompt], None), "an answer that is not the one it gets alone"
                counts["left" if text is None else "answered"] += 1
                if loop.time() > end:
                    return

        everyone = asyncio.gather(*(one(index % 3 == 0) for index in range(clients)))
        await asyncio.wait_for(everyone, seconds + 240)
    return counts


@pytest.fixture(scope="module")
def expected(session):
    """Greedy answers to some prompts, each asked alone."""
    prompts = [f"def f{n}(x):" for n in range(6)]
    ids = [[session.tokenizer.bos_id, *session.tokenizer.encode(prompt)] for prompt in prompts]
    texts = [complete(session, [one], max_new_tokens=24)[0].text for one in ids]
    return dict(zip(prompts, texts, strict=True))


@pytest.mark.parametrize(("clients", "seconds"), [(60, 0), pytest.param(200, 120, marks=pytest.mark.slow)])
def test_clients_that_leave_stop_nobody_else(url, expected, clients, seconds):
    """More streams and requests at once than there are threads in the pool, a third of the clients leaving."""
    counts = asyncio.run(crowd(url, expected, clients=clients, seconds=seconds, seed=0))
    assert counts["answered"] >= clients * 2 // 3


KINDS = json.loads(
    '[null, true, 0, 1, 3, -1, 1.5, -0.5, 1e300, "", "x", "\\ud83d", "<s>", "é", [], [1], {}, [[1, 5]]]'
)
KINDS += [10**400, "a" * 9000]
FIELDS = """prompt messages max_tokens max_completion_tokens temperature top_p n best_of stop stream echo logprobs
top_logprobs seed model anything"""


def fuzzed(rng):
    """A body for one of the two routes: values of all kinds in the fields that the server reads."""
    role, content = rng.choice(["user", "assistant", "tool", "", 3]), rng.choice([*KINDS, "hello"])
    message = {"role": role, "content": content}
    messages = [{"role": "user", "content": "hi"}, message][: rng.randint(1, 2)]
    body = {"prompt": "a b", "messages": messages, "max_tokens": 2}
    for field in rng.sample(FIELDS.split(), rng.randint(1, 3)):
        body[field] = rng.choice([*KINDS, [message], [rng.choice(KINDS)]])
    text = json.dumps(body)
    if rng.random() < 0.2:
        place, noise = rng.randrange(len(text)), rng.choice(["", "{", "[" * 3000, "\0", '"', "NaN"])
        text = text[:place] + noise + text[place + rng.randint(0, 3) :]
    return rng.choice(["/v1/completions", "/v1/chat/completions"]), text


@pytest.mark.slow
def test_500_random_bodies_get_an_answer_or_a_reason(session):
    client = TestClient(application(session, "tiny"), raise_server_exceptions=False)
    rng, seen = random.Random(0), {}
    for _ in range(500):
        route, text = fuzzed(rng)
        answer = client.post(route, content=text.encode("utf-8", "surrogatepass"))
        assert answer.status_code in (200, 400), (route, text[:300], answer.text)
        assert "server_error" not in answer.text, (route, text[:300], answer.text)
        seen[answer.status_code] = seen.get(answer.status_code, 0) + 1
    assert min(seen.values()) > 50, seen
    assert client.post("/v1/completions", json={"prompt": "a b", "max_tokens": 2}).status_code == 200


def test_lm_eval_scores_over_http_what_it_scores_in_process(url, session, chat_model_export):
    pytest.importorskip("tenacity", reason="lm-eval's HTTP models need it: pip install 'lm-eval[api]'")
    harness = pytest.importorskip("lm_eval.models.openai_completions", reason="lm-eval is not installed")
    from lm_eval.api.instance import Instance

    from lemur_jax.evals.harness import LemurLM

    pairs = [("def f(x):", " return x"), ("a b c", " d"), ("x", " A longer answer, of words")]
    kind = {"request_type": "loglikelihood", "doc": {}}
    requests = [Instance(**kind, arguments=pair, idx=index) for index, pair in enumerate(pairs)]
    options = {"tokenizer": str(chat_model_export), "tokenizer_backend": "huggingface", "max_length": 100}
    url = f"{url}/completions"
    remote = harness.LocalCompletionsAPI(base_url=url, model="tiny", add_bos_token=False, **options)
    got, expected = remote.loglikelihood(requests), LemurLM(session).loglikelihood(requests)
    np.testing.assert_allclose([x for x, _ in got], [x for x, _ in expected], atol=1e-3)
    assert [greedy for _, greedy in got] == [greedy for _, greedy in expected]
