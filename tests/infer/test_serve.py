"""The endpoint through OpenAI's own client, over a small random model."""

import jax
import numpy as np
import pytest

pytest.importorskip("openai", reason="openai is not installed: pip install '.[eval]'")

import httpx
import openai
from starlette.testclient import TestClient

from lemur_jax.agents.episodes import endpoint_agent
from lemur_jax.infer.generate import generate
from lemur_jax.infer.serve import application
from lemur_jax.models import decoder
from lemur_jax.models.decoder import Compute
from lemur_jax.text.chat_template import render_chat


@pytest.fixture(scope="module")
def client(url):
    return openai.OpenAI(base_url=url, api_key="none", max_retries=0)


def test_models(client):
    assert list(client.models.list()) == [client.models.retrieve("tiny")]
    with_slash, without = (client.get(path, cast_to=httpx.Response) for path in ("/models/", "/models"))
    assert with_slash.json() == without.json()
    with pytest.raises(openai.NotFoundError, match="there is no model 'x/y', only 'tiny'"):
        client.models.retrieve("x/y")


def test_completions_with_logprobs(client, session):
    options = {"model": "tiny", "temperature": 0, "max_tokens": 8, "logprobs": 1}
    answer = client.completions.create(prompt="def f(x):", **options)
    choice = answer.choices[0]
    assert choice.finish_reason == "length"
    assert answer.usage.completion_tokens == len(choice.logprobs.tokens) == 8
    # The same again as ids, together with another.
    tokenizer = session.tokenizer
    prompt = [tokenizer.bos_id, *tokenizer.encode("def f(x):")]
    both = client.completions.create(prompt=[prompt, [1, 5]], **options)
    assert both.choices[0].text == choice.text


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
    echoed = client.completions.create(**options, logprobs=3, echo=True).choices[0]
    told = echoed.logprobs
    assert echoed.text.startswith("def f(x):")
    assert told.top_logprobs[0] is told.token_logprobs[0] is None
    assert len(told.top_logprobs) == len(told.tokens) == len(told.text_offset) == len(prompt) + 6
    assert told.text_offset[len(prompt)] == len("def f(x):")
    (found,) = generate(session, [prompt], max_new_tokens=6, stop_ids=())
    ids = [*prompt, *found.tokens]
    expected = reference(session, ids)
    own = expected[range(len(ids) - 1), ids[1:]]
    np.testing.assert_allclose(told.token_logprobs[1:], own, atol=1e-4)
    for place, top in enumerate(told.top_logprobs[1:]):
        best = np.argsort(-expected[place])[:3]
        assert list(top) == [text_of(tokenizer, int(token)) for token in best]
        np.testing.assert_allclose(list(top.values()), expected[place][best], atol=1e-4)
    # What was generated greedily is the likeliest, to the last bit: harnesses compare so.
    for value, top in list(zip(told.token_logprobs, told.top_logprobs, strict=True))[len(prompt) :]:
        assert value == max(top.values())
    assert client.completions.create(**options, logprobs=0).choices[0].logprobs.top_logprobs is None


def text_of(tokenizer, token):
    """As OpenAI writes a token."""
    piece = tokenizer.token(token)
    if not piece.startswith("<0x"):
        return piece.replace("▁", " ")
    value = int(piece[3:5], 16)
    return chr(value) if value < 128 else f"bytes:\\x{value:02x}"


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
    following = client.completions.create(prompt="a b", **(options | {"seed": 6}))
    assert following.choices[0].text not in {choice.text for choice in answer.choices}
    options |= {"messages": [{"role": "user", "content": "hi"}], "n": 2, "logprobs": True, "top_logprobs": 2}
    several = client.chat.completions.create(**options)
    assert several.choices[0].message.content != several.choices[1].message.content
    for choice in several.choices:
        for entry in choice.logprobs.content:
            first, second = entry.top_logprobs
            assert first.logprob >= second.logprob


def test_text_logprobs_usage_and_a_stream_end_with_the_stop_string(client):
    options = {"model": "tiny", "prompt": "def f(x):", "temperature": 0, "max_tokens": 24}
    (whole,) = client.completions.create(**options, logprobs=1).choices
    tokens, stop = whole.logprobs.tokens, "):"  # a token of the tokenizer
    count = tokens.index(stop) + 1
    assert 1 < count < 8  # the server looks at answers every 8 tokens
    answer = client.completions.create(**options, logprobs=1, stop=stop)
    (cut,) = answer.choices
    assert (cut.text, cut.finish_reason) == (whole.text[: whole.text.index(stop)], "stop")
    assert cut.logprobs.tokens == tokens[:count]
    assert cut.logprobs.token_logprobs == whole.logprobs.token_logprobs[:count]
    assert answer.usage.completion_tokens == count
    for changes, expected in (({}, whole), ({"stop": [stop]}, cut)):
        pieces = [chunk.choices[0] for chunk in client.completions.create(**options, **changes, stream=True)]
        assert "".join(piece.text for piece in pieces) == expected.text
        assert pieces[-1].finish_reason == expected.finish_reason


def test_a_stream_tells_its_usage_and_its_role(client):
    options = {"model": "tiny", "temperature": 0, "max_tokens": 12, "stop": "):"}
    stream = {"stream": True, "stream_options": {"include_usage": True}}
    for create, prompt in (
        (client.completions.create, {"prompt": "def f(x):"}),
        (client.chat.completions.create, {"messages": [{"role": "user", "content": "hi"}]}),
    ):
        *chunks, last = create(**options, **prompt, **stream)
        assert (last.choices, last.usage) == ([], create(**options, **prompt).usage)
        assert all(chunk.usage is None and chunk.choices for chunk in chunks)
    assert [chunk.choices[0].delta.role for chunk in chunks[:2]] == ["assistant", None]


def test_chat(client, url):
    options = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "temperature": 0}
    answer = client.chat.completions.create(**options, max_tokens=12, logprobs=True)
    choice = answer.choices[0]
    assert choice.message.role == "assistant"
    assert len(choice.logprobs.content) == answer.usage.completion_tokens
    joined = b"".join(bytes(entry.bytes) for entry in choice.logprobs.content)
    assert joined.decode(errors="ignore") == choice.message.content.replace("\ufffd", "")
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
        ({"max_tokens": 128}, "longer than the model's"),
        ({"temperature": -1}, "temperature is -1"),
        ({"prompt": []}, "prompt must be"),
        ({"prompt": [10**6]}, "outside the model's vocabulary"),
        ({"prompt": [10**6], "max_tokens": 0, "echo": True}, "outside the model's vocabulary"),
        ({"stream": True, "logprobs": 0}, "a stream has no logprobs"),
        ({"stream": True, "echo": True}, "a stream has no echo"),
        ({"suffix": "y"}, "suffix is not supported"),
        ({"presence_penalty": 0.5}, "presence_penalty is not supported"),
        ({"extra_body": {"ignore_eos": True}}, "ignore_eos is not supported"),
        ({"extra_body": {"of_another_server": 1}}, "of_another_server is not supported"),
        ({"extra_body": {"top_logprobs": 2}}, "top_logprobs is not supported"),
        ({"extra_body": {"add_special_tokens": False}}, "add_special_tokens is not supported"),
        ({"max_tokens": 2, "extra_body": {"max_completion_tokens": 3}}, "max_completion_tokens differ"),
        ({"extra_body": {"max_tokens": False}}, "max_tokens is False"),
        ({"extra_body": {"max_tokens": 0.0}}, "max_tokens is 0.0"),
        ({"extra_body": {"min_p": 2}}, "min_p is 2"),
        ({"stream": True, "max_tokens": 1000}, "max_tokens is 1000"),
        ({"extra_body": {"max_completion_tokens": "x"}}, "max_completion_tokens is 'x'"),
        ({"temperature": 10**30}, "temperature is"),
        ({"prompt": "a" * 10_000}, "too many for the model's 128 tokens"),
        ({"prompt": ["a"] * 20, "n": 20}, "one request may have 256"),
        ({"max_tokens": 0, "stream": True}, "max_tokens is 0"),
        ({"max_tokens": 0, "temperature": -1}, "temperature is -1"),
        ({"max_tokens": 0, "stop": [[]]}, "stop must be"),
        ({"stream_options": {"include_usage": True}}, "stream_options needs stream: true"),
        ({"stream": True, "stream_options": {"x": True}}, "stream_options.x is not supported"),
        ({"extra_body": {"stream_options": [1]}}, r"stream_options is \[1\]: it must be an object"),
        ({"extra_body": {"detokenize": False}}, "detokenize is not supported"),
    ],
)
def test_bad_requests(client, changes, message):
    with pytest.raises(openai.BadRequestError, match=message):
        client.completions.create(**({"model": "tiny", "prompt": "x"} | changes))


def test_what_a_chat_cannot_do_is_refused_and_what_asks_for_nothing_is_not(client):
    options = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    for changes in (
        {"tools": [tool]},
        {"response_format": {"type": "json_object"}},
        {"logit_bias": {"5": 1}},
        {"tool_choice": "required"},
        {"verbosity": "low"},
    ):
        with pytest.raises(openai.BadRequestError, match=f"{next(iter(changes))} is not supported") as found:
            client.chat.completions.create(**options, **changes)
        assert found.value.body.keys() == {"message", "type", "param", "code"}
    with pytest.raises(openai.BadRequestError, match="top_logprobs needs logprobs"):
        client.chat.completions.create(**options, top_logprobs=2)
    nothing = {"tools": [], "response_format": {"type": "text"}, "logit_bias": {}, "frequency_penalty": 0}
    others = {"tools": None, "add_special_tokens": True, "modalities": []}
    nothing |= {"user": "me", "tool_choice": "auto", "extra_body": others}
    assert client.chat.completions.create(**options, **nothing).usage.completion_tokens == 2


def test_names_and_variables_reach_the_chat_template_or_are_refused(client, session, monkeypatch):
    options = {"model": "tiny", "temperature": 0, "max_tokens": 6}
    head = {"role": "assistant", "content": []}  # what a model has said that ended at once

    def ask(turn, **given):
        found = client.chat.completions.create(messages=[head, turn], **options, extra_body=given)
        return found.choices[0].message.content

    named = {"role": "user", "content": "hi", "name": "Ada"}
    variables = {"chat_template_kwargs": {"enable_thinking": False}}
    for turn, given, message in (
        (named, {}, r"leaves out the name of turn 1 \(user\)"),
        (named | {"name": ["Ada"]}, {}, r"messages\[1\] is .* its name a string"),
        (named | {"prefix": True}, {}, r"messages\[1\]\.prefix is not supported"),
        (named | {"tool_calls": [{}]}, {}, r"messages\[1\]\.tool_calls is not supported"),
        ({"role": "user", "content": [{"type": "image_url"}]}, {}, "'image_url'; only text is supported"),
        ({"role": "user", "content": "hi"}, variables, "leaves out 'enable_thinking'"),
        (named, {"chat_template_kwargs": "x"}, "chat_template_kwargs is 'x': it must be an object"),
    ):
        with pytest.raises(openai.BadRequestError, match=message):
            ask(turn, **given)
    template = "{% for m in messages %}{{ m.name }}:{{ m.content or '-' }}{% endfor %}{{ enable_thinking }}"
    monkeypatch.setattr(session.tokenizer, "chat_template", template)
    written = client.completions.create(prompt=session.tokenizer.encode(":-Ada:hiFalse"), **options)
    assert ask(named, **variables) == written.choices[0].text
    server = TestClient(application(session, "tiny", chat_template_kwargs={"enable_thinking": False}))
    body = options | {"messages": [named]}
    for given, prompt in (({}, "Ada:hiFalse"), ({"chat_template_kwargs": {"enable_thinking": 7}}, "Ada:hi7")):
        found = server.post("/v1/chat/completions", json=body | given).json()["usage"]["prompt_tokens"]
        assert found == len(session.tokenizer.encode(prompt))


def test_without_a_seed_every_request_draws_anew(client):
    options = {"model": "tiny", "prompt": "def f(x):", "max_tokens": 16}
    assert len({client.completions.create(**options).choices[0].text for _ in range(3)}) == 3
    assert len({client.completions.create(**options, seed=3).choices[0].text for _ in range(3)}) == 1
    drawn = [client.completions.create(**options, seed=3, extra_body=each) for each in ({}, {"top_k": -1})]
    assert drawn[0].choices[0].text == drawn[1].choices[0].text
    # A filter that leaves the likeliest token alone.
    best = client.completions.create(**options, temperature=0).choices[0].text
    for changes in ({"top_k": 1}, {"min_p": 1}, {"top_k": -1, "top_p": 1e-6}):
        assert client.completions.create(**options, extra_body=changes).choices[0].text == best


def test_without_max_tokens_an_answer_takes_what_space_there_is(client, session):
    longest = session.model.max_position_embeddings
    answer = client.completions.create(model="tiny", prompt=[5] * (longest - 3), temperature=0)
    assert answer.usage.completion_tokens <= 3
    with pytest.raises(openai.BadRequestError, match="longer than the model's"):
        client.completions.create(model="tiny", prompt=[5] * longest)
    messages = [{"role": "user", "content": "hi"}]
    assert client.chat.completions.create(model="tiny", messages=messages).usage.total_tokens <= longest


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
