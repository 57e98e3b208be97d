import pytest

from lemur_jax.infer import complete
from lemur_jax.infer.complete import pieces, with_text
from lemur_jax.infer.engine import Engine, Request
from lemur_jax.infer.text import continuation, offsets
from tests.helpers.sessions import recite

TEXT = "def naïve(x):\n    return '漢字 😀', x  # ça"
BYTES = "a ሰላምሰላም"  # each letter is three byte tokens


@pytest.mark.parametrize(
    ("text", "cut"), [*((TEXT, cut) for cut in (0, 1, 3, 9, 20)), *((BYTES, cut) for cut in range(9, 18))]
)
def test_prompt_and_continuation_make_up_the_text(small_chat_tokenizer, text, cut):
    """Wherever the prompt is cut, even inside the bytes of a character."""
    ids = [small_chat_tokenizer.bos_id, *small_chat_tokenizer.encode(text)]
    prompt, rest = ids[: cut + 1], ids[cut + 1 :]
    shown = small_chat_tokenizer.decode(prompt).rstrip("\ufffd")
    assert shown + continuation(small_chat_tokenizer, prompt, rest) == small_chat_tokenizer.decode(ids)


def test_a_prompt_may_end_with_the_replacement_character(small_chat_tokenizer):
    prompt, more = small_chat_tokenizer.encode("a\ufffd"), small_chat_tokenizer.encode("b", prefix=False)
    assert small_chat_tokenizer.decode(prompt) == "a\ufffd"
    assert continuation(small_chat_tokenizer, prompt, more) == "b"


def test_offsets_are_lengths_of_the_text_before(small_chat_tokenizer):
    text = "def naïve(x): '漢 😀'"
    prompt, answer = (small_chat_tokenizer.encode(text, prefix=prefix) for prefix in (True, False))
    ids = [small_chat_tokenizer.bos_id, *prompt, *answer]
    shown = [small_chat_tokenizer.decode(ids[:count], skip_special=True) for count in range(len(ids))]
    before = [len(each.rstrip("\ufffd")) for each in shown]
    assert offsets(small_chat_tokenizer, ids[: len(prompt) + 1], answer, text + text) == before
    cut = offsets(small_chat_tokenizer, [], answer, text[:5])  # at a stop string
    assert cut == [min(5, place - len(text)) for place in before[len(prompt) + 1 :]]


def test_a_character_that_never_ends_is_shown_as_broken(small_chat_tokenizer):
    prompt, ids = small_chat_tokenizer.encode("a"), small_chat_tokenizer.encode("😀", prefix=False)
    assert continuation(small_chat_tokenizer, prompt, ids) == "😀"
    assert set(continuation(small_chat_tokenizer, prompt, ids[:-1])) == {"\ufffd"}


def streamed(tokenizer, first, ids, stops=()):
    """The pieces of an answer of these ids, which the engine makes one by one."""
    session = recite(tokenizer, [first, *ids])
    engine = Engine(session)
    request = engine.submit(Request(prompt=[first], max_new_tokens=len(ids)))
    for piece in pieces(session, engine, request, stops):
        if piece is None:
            engine.step(1)
        else:
            yield piece


def test_a_stop_string_of_a_broken_character_is_not_the_beginning_of_a_whole_one(small_chat_tokenizer):
    first, *ids = small_chat_tokenizer.encode("a😀b", prefix=False)
    *found, end = streamed(small_chat_tokenizer, first, ids, ["\ufffd"])
    assert ("".join(text for text, _ in found), end) == ("😀b", ("", "length"))


@pytest.mark.parametrize(
    "spelled", [["<0x3D>", "<0xBD>"], ["<0x0A>", "<0xF0>", "<0x9F>", "<0x98>", "<0x80>"]]
)
def test_a_stream_is_the_text_of_the_whole_answer(small_chat_tokenizer, spelled, monkeypatch):
    """A byte shows U+FFFD once another one beside it is no UTF-8. No look decodes what is known."""
    first, *ids = map(small_chat_tokenizer.find, ["a", "b", *spelled, *"cdefghijk"])
    counts = []
    monkeypatch.setattr(
        complete, "continuation", lambda *args: counts.append(len(args[2])) or continuation(*args)
    )
    text = "".join(text for text, _ in streamed(small_chat_tokenizer, first, ids))
    assert text == continuation(small_chat_tokenizer, [first], ids)
    assert counts[-8:] == [1] * 8


EQUALS = ["<0x3D>", "<0x0A>", "<0xBD>"]  # together no UTF-8


@pytest.mark.parametrize(
    ("spelled", "stops", "text"),
    [
        ("abcdefghijklmn", ["lm", "efghijk"], "abcd"),
        ("abcdefghijklmn", ["cdefghijklm", "h"], "abcdefg"),
        ("abcdefghijklmn", ["zz", "mn"], "abcdefghijkl"),
        (["a", *EQUALS, "b", "c", "d"], ["=", "c"], "a\ufffd\ufffd\ufffdb"),
        (["a", "<0x0A>", "<0xC3>", "<0xA9>", "b", "c"], ["\n"], "a"),
    ],
)
def test_an_answer_ends_at_its_stop_string_however_many_steps_the_engine_makes(
    small_chat_tokenizer, spelled, stops, text
):
    first, *ids = map(small_chat_tokenizer.find, ["*", *spelled])
    session = recite(small_chat_tokenizer, [first, *ids])
    found = []
    for steps in (1, 5, 64):
        engine = Engine(session)
        request = engine.submit(Request(prompt=[first], max_new_tokens=len(ids)))
        while not (answer := with_text(session, request, stops)).finish_reason:
            engine.step(steps)
        found.append(answer)
    assert found[0] == found[1] == found[2]
    assert (found[0].text, found[0].finish_reason) == (text, "stop")
    assert "".join(piece for piece, _ in streamed(small_chat_tokenizer, first, ids, stops)) == text
    assert len(found[0].logprobs) == len(found[0].tokens)
    before = continuation(small_chat_tokenizer, [first], found[0].tokens[:-1])
    assert not any(stop in before for stop in stops)
