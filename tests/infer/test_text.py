import pytest

from lemur_jax.infer.text import continuation

TEXT = "def naïve(x):\n    return '漢字 😀', x  # ça"


@pytest.mark.parametrize("cut", [0, 1, 3, 9, 20])
def test_prompt_and_continuation_make_up_the_text(chat_tokenizer, cut):
    """Wherever the prompt is cut, even inside the bytes of a character."""
    ids = [chat_tokenizer.bos_id, *chat_tokenizer.encode(TEXT)]
    prompt, rest = ids[: cut + 1], ids[cut + 1 :]
    shown = chat_tokenizer.decode(prompt).rstrip("\ufffd")
    assert shown + continuation(chat_tokenizer, prompt, rest) == chat_tokenizer.decode(ids)


def test_the_space_in_front_is_kept(chat_tokenizer):
    prompt, whole = chat_tokenizer.encode("print the"), chat_tokenizer.encode("print the value")
    assert whole[: len(prompt)] == prompt
    assert continuation(chat_tokenizer, prompt, whole[len(prompt) :]) == " value"


def test_a_character_that_never_ends_is_shown_as_broken(chat_tokenizer):
    prompt, ids = chat_tokenizer.encode("a"), chat_tokenizer.encode("😀", prefix=False)
    assert continuation(chat_tokenizer, prompt, ids) == "😀"
    assert set(continuation(chat_tokenizer, prompt, ids[:-1])) == {"\ufffd"}
