"""The endpoint through OpenAI's own client, over a small random model on 8 devices."""

import threading
import time

import jax
import numpy as np
import pytest

pytest.importorskip("starlette", reason="starlette is not installed: pip install '.[eval]'")
pytest.importorskip("openai", reason="openai is not installed: pip install '.[eval]'")
pytest.importorskip("uvicorn", reason="uvicorn is not installed: pip install '.[eval]'")

import openai
import uvicorn

from lemur_jax.agents.episodes import endpoint_agent
from lemur_jax.infer.generate import generate
from lemur_jax.infer.score import score
from lemur_jax.infer import serve
from lemur_jax.infer.serve import application, until
from lemur_jax.infer.session import load
from lemur_jax.models import llama
from lemur_jax.models.llama import Compute
from lemur_jax.parallel.mesh import parse_mesh


@pytest.fixture(scope="module")
def session(chat_model):
    return load(chat_model, parse_mesh("fsdp=4,tensor=2"), "float32")


@pytest.fixture(scope="module")
def url(session):
    config = uvicorn.Config(application(session, "tiny"), host="127.0.0.1", port=0, log_level="error")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.05)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/v1"
    server.should_exit = True
    thread.join()


@pytest.fixture(scope="module")
def client(url):
    return openai.OpenAI(base_url=url, api_key="none", max_retries=0)


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
    logits = llama.forward(
        session.model,
        Compute(),
        jax.tree.map(jax.numpy.asarray, jax.device_get(session.params)),
        tokens,
        positions,
        segments,
    )
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
    alone = client.completions.create(prompt="a b", **options)
    assert alone.choices[0].text == answer.choices[0].text
    chat = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "hi"}],
        "temperature": 2.0,
        "max_tokens": 8,
    }
    several = client.chat.completions.create(**chat, n=2, logprobs=True, top_logprobs=2)
    assert several.choices[0].message.content != several.choices[1].message.content
    for choice in several.choices:
        assert all(len(entry.top_logprobs) == 2 for entry in choice.logprobs.content)
        assert all(
            one.top_logprobs[0].logprob >= one.top_logprobs[1].logprob for one in choice.logprobs.content
        )


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
        ({"n": 2, "best_of": 3}, "best_of the same"),
        ({"n": 2, "stream": True}, "one answer to one prompt"),
        ({"logprobs": 21}, "logprobs is 21"),
        ({"max_tokens": 1000}, "more than the model's"),
        ({"temperature": -1}, "temperature is -1"),
        ({"prompt": []}, "prompt must be"),
        ({"prompt": [10**6]}, "outside the model's vocabulary"),
        ({"stream": True, "max_tokens": 1000}, "max_tokens is 1000"),
    ],
)
def test_bad_requests(client, changes, message):
    with pytest.raises(openai.BadRequestError, match=message):
        client.completions.create(**({"model": "tiny", "prompt": "x"} | changes))


def test_until():
    assert "".join(until(["ab", "cS", "TOP", "x"], ["STOP"])) == "abc"
    assert "".join(until(["ab", "cS", "TO"], ["STOP"])) == "abcSTO"
    assert "".join(until(["abc"], [])) == "abc"


def test_lm_eval_scores_over_http_what_it_scores_in_process(url, session, chat_model_export):
    pytest.importorskip("tenacity", reason="lm-eval's HTTP models need it: pip install 'lm-eval[api]'")
    harness = pytest.importorskip("lm_eval.models.openai_completions", reason="lm-eval is not installed")
    from lm_eval.api.instance import Instance

    from lemur_jax.evals.harness import LemurLM

    pairs = [("def f(x):", " return x"), ("a b c", " d"), ("x", " A longer answer, of words")]
    requests = [
        Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=i) for i, pair in enumerate(pairs)
    ]
    options = {
        "tokenizer": str(chat_model_export),
        "tokenizer_backend": "huggingface",
        "add_bos_token": False,
    }
    remote = harness.LocalCompletionsAPI(
        base_url=f"{url}/completions", model="tiny", max_length=100, **options
    )
    got, expected = remote.loglikelihood(requests), LemurLM(session).loglikelihood(requests)
    np.testing.assert_allclose([x for x, _ in got], [x for x, _ in expected], atol=1e-3)
    assert [greedy for _, greedy in got] == [greedy for _, greedy in expected]
