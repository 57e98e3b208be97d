import pytest

from lemur_jax.infer.text import continuation, stream_text

TEXT = "def naïve(x):\n    return '漢字 😀', x  # ça"


@pytest.mark.parametrize("cut", [0, 1, 3, 9, 20])
@pytest.mark.parametrize("size", [1, 2, 5])
def test_pieces_make_up_the_text(chat_tokenizer, cut, size):
    """Wherever prompt and pieces are cut, even inside the bytes of a character."""
    ids = [chat_tokenizer.bos_id, *chat_tokenizer.encode(TEXT)]
    prompt, rest = ids[: cut + 1], ids[cut + 1 :]
    pieces = list(
        stream_text(chat_tokenizer, prompt, [rest[i : i + size] for i in range(0, len(rest), size)])
    )
    assert all(pieces)
    assert not any("\ufffd" in piece for piece in pieces)
    assert chat_tokenizer.decode(prompt).rstrip("\ufffd") + "".join(pieces) == chat_tokenizer.decode(ids)


def test_the_space_in_front_is_kept(chat_tokenizer):
    prompt, whole = chat_tokenizer.encode("print the"), chat_tokenizer.encode("print the value")
    assert whole[: len(prompt)] == prompt
    assert continuation(chat_tokenizer, prompt, whole[len(prompt) :]) == " value"


def test_a_character_that_never_ends_is_shown_as_broken(chat_tokenizer):
    prompt, ids = chat_tokenizer.encode("a"), chat_tokenizer.encode("😀", prefix=False)
    assert continuation(chat_tokenizer, prompt, ids) == "😀"
    assert set(continuation(chat_tokenizer, prompt, ids[:-1])) == {"\ufffd"}
