"""Generated ids as text, piece by piece."""

from collections.abc import Iterable, Iterator, Sequence

from lemur_jax.text.tokenizer import Tokenizer

# Tokens before the generated ones that are decoded with them: what a token looks like can depend on
# its neighbours (a leading space, a character spelled in bytes), though not on more than these.
CONTEXT = 8

# What a decoder shows for bytes that do not make a character (yet).
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
