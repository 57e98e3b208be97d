"""The endpoint through OpenAI's own client, over a small random model on 8 devices."""

import threading
import time

import numpy as np
import pytest

pytest.importorskip("starlette", reason="starlette is not installed: pip install '.[eval]'")
pytest.importorskip("openai", reason="openai is not installed: pip install '.[eval]'")
pytest.importorskip("uvicorn", reason="uvicorn is not installed: pip install '.[eval]'")

import openai
import uvicorn

from lemur_jax.evals.agents.episodes import endpoint_agent
from lemur_jax.evals.serve import application, until
from lemur_jax.infer.score import score
from lemur_jax.infer.session import load
from lemur_jax.parallel.mesh import parse_mesh


@pytest.fixture(scope="module")
def session(checkpoint):
    return load(checkpoint, parse_mesh("fsdp=4,tensor=2"), "float32")


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
        ({"n": 2}, "n and best_of must be 1"),
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
