"""Chat with models that recite: what they say is known, so is what they must have been given."""

import functools

import pytest

from lemur_jax.common.errors import UserError
from lemur_jax.infer import chat
from lemur_jax.infer.chat import Options, converse, reply
from lemur_jax.infer.complete import complete
from lemur_jax.text.chat_template import encode_chat
from lemur_jax.text.tokenizer_files import extend
from tests.helpers.sessions import recite

ANSWER = "yes: 😀!"
SHORT = Options(max_new_tokens=20)


@pytest.fixture(scope="module")
def parrot(small_chat_tokenizer):
    """Says ANSWER after the newline of an assistant's header, whatever it was asked."""
    newline = small_chat_tokenizer.encode("\n", prefix=False)
    answer = small_chat_tokenizer.encode(ANSWER, prefix=False)
    ids = [*newline, *answer, small_chat_tokenizer.control_tokens["<|im_end|>"]]
    return recite(small_chat_tokenizer, ids)


def test_variables_reach_the_template(parrot, monkeypatch):
    monkeypatch.setattr(parrot.tokenizer, "chat_template", "{{ x + '\n' }}")
    options = Options(max_new_tokens=20, chat_template_kwargs={"x": "given"})
    messages = [{"role": "user", "content": ""}]
    assert parrot.tokenizer.decode(options.encode(parrot.tokenizer, messages)) == "given\n"
    assert "".join(reply(parrot, messages, options)) == ANSWER
    deep = functools.reduce(lambda inner, _: [inner], range(9000), "x")
    with pytest.raises(UserError, match="nested too deeply"):
        Options(chat_template_kwargs={"x": deep}).encode(parrot.tokenizer, messages)


def test_an_answer_is_streamed_without_its_end(parrot, monkeypatch):
    """Token by token; a character of several tokens is held back until it is whole."""
    monkeypatch.setattr(chat, "STEPS", 1)
    pieces = list(reply(parrot, [{"role": "user", "content": "hello <|im_end|>"}], SHORT))
    assert "".join(pieces) == ANSWER
    assert len(pieces) > 4
    assert all(pieces)
    assert not any("\ufffd" in piece for piece in pieces)


def test_llama_3_ends_a_turn_with_its_own_token(small_chat_tokenizer, tmp_path):
    """In chat and in completions; the model goes on after it, and nobody is to see that."""
    for name, content in small_chat_tokenizer.files().items():
        (tmp_path / name).write_bytes(content)
    template = (
        "{% for message in messages %}{% generation %}{{ message['content'] + '<|eot_id|>\n' }}"
        "{% endgeneration %}{% endfor %}"
    )
    tokenizer = extend(tmp_path, tmp_path / "llama_3", ["<|eot_id|>"], chat_template=template)
    newline, answer, more = (tokenizer.encode(text, prefix=False) for text in ("\n", ANSWER, "xz"))
    ids = [*newline, *answer, tokenizer.control_tokens["<|eot_id|>"], *more]
    session = recite(tokenizer, ids)
    assert "".join(reply(session, [{"role": "user", "content": "hi"}], SHORT)) == ANSWER
    (found,) = complete(session, [newline], max_new_tokens=20)
    assert (found.text, found.content, found.finish_reason) == (ANSWER, tuple(answer), "stop")
    assert found.tokens == (*answer, tokenizer.control_tokens["<|eot_id|>"])


def test_the_model_sees_the_whole_conversation(parrot, monkeypatch):
    prompts = []
    make_requests = chat.make_requests

    def spy(given, *options):
        prompts.extend(given)
        return make_requests(given, *options)

    monkeypatch.setattr(chat, "make_requests", spy)
    written = []
    messages = converse(parrot, ["one\n", " ", "two\n"], written.append, SHORT, system="be brief")
    expected = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": ANSWER},
        {"role": "user", "content": "two"},
        {"role": "assistant", "content": ANSWER},
    ]
    assert messages == expected
    assert "".join(written) == f"{ANSWER}\n{ANSWER}\n"
    for prompt, turns in zip(prompts, (expected[:2], expected[:4]), strict=True):
        assert prompt == encode_chat(parrot.tokenizer, turns, add_generation_prompt=True)[0]


def test_commands(parrot):
    written = []
    lines = ["/help", "one", "/reset", "two", "/exit", "three"]
    messages = converse(parrot, lines, written.append, SHORT)
    assert [message["content"] for message in messages] == ["two", ANSWER]
    assert written[0] == chat.HELP + "\n"


def test_old_turns_are_forgotten_aloud(parrot):
    written = []
    lines = ["tell me " + "a" * index for index in range(6)]
    messages = converse(parrot, lines, written.append, SHORT, system="s")
    assert [message["role"] for message in messages[:2]] == ["system", "user"]
    assert messages[-2]["content"] == lines[-1]
    assert 3 <= len(messages) < 1 + 2 * len(lines)
    assert any("no longer fit" in text for text in written)


def test_what_fits_begins_with_a_turn_of_the_user(parrot):
    messages = [{"role": role, "content": "a"} for role in ("system", *("user", "assistant") * 4, "user")]
    for limit in range(96):
        kept = chat.fit(parrot, messages, Options(max_new_tokens=limit))
        assert [turn["role"] for turn in kept[:2]] == ["system", "user"]


def test_an_answer_is_stripped_and_each_turn_has_its_own_seed(parrot, monkeypatch):
    seeds, written = set(), []
    monkeypatch.setattr(chat, "reply", lambda *_, seed: seeds.add(seed) or [" ", " yes", "!\n"])
    messages = converse(parrot, ["one", "two"], written.append, SHORT)
    assert ("".join(written), messages[1]["content"], len(seeds)) == (2 * "yes!\n\n", "yes!", 2)


def test_a_turn_that_is_too_long_is_told_and_forgotten(parrot):
    lines = ["one", "x y z " * 30, "two"]
    written = []
    messages = converse(parrot, lines, written.append, SHORT, continue_on_error=True)
    assert [message["content"] for message in messages] == ["one", ANSWER, "two", ANSWER]
    assert any("max_position_embeddings 96" in text for text in written)
    with pytest.raises(UserError, match="max_position_embeddings 96"):
        converse(parrot, lines, written.append, SHORT)


def test_an_answer_cut_short_is_kept(parrot):
    written = []

    def write(text):
        written.append(text)
        if len(written) == 1:
            raise KeyboardInterrupt

    messages = converse(parrot, ["one", "two"], write, SHORT)
    assert [message["role"] for message in messages] == ["user", "assistant"] * 2
    assert ANSWER.startswith(messages[1]["content"])
    assert messages[1]["content"] != ANSWER
    assert messages[3]["content"] == ANSWER


def test_a_base_model_cannot_chat(small_chat_tokenizer):
    base = type(small_chat_tokenizer).from_files(
        {"tokenizer.model": small_chat_tokenizer.files()["tokenizer.model"]}
    )
    session = recite(base, [3, 4])
    with pytest.raises(UserError, match="no chat template"):
        list(reply(session, [{"role": "user", "content": "hello"}]))
