"""The endpoint and clients that are rude, broken, many, or not meant to be here."""

import asyncio
import json
import random
import time

import pytest

pytest.importorskip("httpx", reason="httpx is not installed: pip install '.[eval]'")

import httpx
from starlette.testclient import TestClient

from lemur_jax.common.errors import UserError
from lemur_jax.infer import serve
from lemur_jax.infer.complete import complete
from lemur_jax.infer.engine import Engine
from lemur_jax.infer.score import score
from lemur_jax.infer.serve import application, listen
from lemur_jax.infer.serve_requests import CHAT_FIELDS, COMPLETION_FIELDS
from lemur_jax.infer.serve_worker import Job


@pytest.mark.parametrize("port", [-1, 80_000, 10**9, "taken"])
def test_an_address_that_cannot_be_had_is_named(port):
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1] if port == "taken" else port
        with pytest.raises(UserError, match=f"cannot listen on 127.0.0.1 port {port} .*--port"):
            listen("127.0.0.1", port)


def test_requests_that_are_not_meant_for_this_server(url):
    body = json.dumps({"prompt": "x", "max_tokens": 1})
    kind = {"content-type": "application/json"}
    for headers, status in (
        (kind, 200),
        ({}, 200),
        ({"content-type": "application/merge-patch+json"}, 200),
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


def test_answers_go_on_between_the_prompts_that_another_client_has_scored(session, monkeypatch):
    events, step = [], Engine.step
    monkeypatch.setattr(
        serve, "score", lambda session, pairs: events.append("score") or score(session, pairs)
    )
    monkeypatch.setattr(Engine, "step", lambda *args: events.append("step") or step(*args))
    server = TestClient(application(session, "tiny"))
    body = {"prompt": ["a", "b", "c"], "max_tokens": 0, "echo": True, "logprobs": 0}
    assert server.post("/v1/completions", json=body).status_code == 200
    assert " ".join(events[:6]) == "step score step score step score"


def test_the_work_of_a_late_answer_is_dropped(session, monkeypatch):
    jobs = []
    monkeypatch.setattr(serve, "ANSWER_SECONDS", 0.0)
    monkeypatch.setattr(serve.Worker, "add", lambda _, job: jobs.append(job))
    answer = TestClient(application(session, "tiny")).post("/v1/completions", json={"prompt": "x"})
    assert (answer.status_code, jobs[0].dropped) == (503, True)


def test_the_work_of_a_client_that_has_left_is_not_begun():
    begun = []

    def work(engine):
        begun.append(engine)
        yield 1

    async def advance():
        job = Job(work)
        job.dropped = True
        return job.advance(None)

    assert not asyncio.run(advance())
    assert not begun


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
    user, calls = {"role": "user"}, [{"name": "f", "arguments": {"x": json.loads("[" * 600 + "]" * 600)}}]
    bad = [{"role": ["x"], "content": "x"}, user | {"content": [{"type": "image"}]}]
    bad += [{"role": "x", "content": "x"}, {"role": "assistant", "content": "x", "tool_calls": calls}]
    for messages in (None, 7, [], [7], [{}], *([each] for each in bad)):
        answer = httpx.post(f"{url}/chat/completions", json={"messages": messages})
        assert answer.status_code == 400, (messages, answer.text)


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


def fuzzed(rng):
    """A body for one of the two routes: values of all kinds in the fields that it reads."""
    message = {
        "role": rng.choice(["user", "assistant", "tool", "", 3]),
        "content": rng.choice([*KINDS, "hello"]),
    }
    hello = {"role": "user", "content": "hi"}
    bodies = {"completions": {"prompt": "a b"}, "chat/completions": {"messages": [hello]}}
    route, fields = rng.choice([("completions", COMPLETION_FIELDS), ("chat/completions", CHAT_FIELDS)])
    body = {**bodies[route], "max_tokens": 2}
    for field in rng.sample(sorted(fields), rng.randint(1, 2)):
        body[field] = rng.choice([*KINDS, [hello, message], [rng.choice(KINDS)]])
    return f"/v1/{route}", json.dumps(body)


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
