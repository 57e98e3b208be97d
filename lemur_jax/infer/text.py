"""Generated ids as text, piece by piece."""

from collections.abc import Iterable, Iterator, Sequence

from lemur_jax.text.tokenizer import Tokenizer

# Tokens of the prompt that are decoded with the generated ones: the text of a token can depend on the tokens before it
# (a leading space, a character of several bytes).
CONTEXT = 8

# A decoder's text for bytes that are not a character (yet).
INCOMPLETE = "\ufffd"


def continuation(tokenizer: Tokenizer, prompt: Sequence[int], tokens: Sequence[int]) -> str:
    """The text that `tokens` add to `prompt`, with the space in front if there is one."""
    return "".join(stream_text(tokenizer, prompt, [tokens]))


def stream_text(
    tokenizer: Tokenizer, prompt: Sequence[int], pieces: Iterable[Sequence[int]]
) -> Iterator[str]:
    """`continuation` of ids that come in pieces; a character is held back until its last byte is there.

    The strings joined are the text of all ids joined, and none of them is empty.
    """
    ids = list(prompt[-CONTEXT:])
    shown = tokenizer.decode(ids).rstrip(INCOMPLETE)
    for piece in pieces:
        ids += piece
        text = tokenizer.decode(ids)
        complete = text.rstrip(INCOMPLETE)
        if len(complete) > len(shown):
            yield complete[len(shown) :]
            shown = complete
    if (text := tokenizer.decode(ids)) != shown:
        yield text[len(shown) :]
