"""Generated ids as text."""

import codecs
import itertools
import re
from collections.abc import Sequence

from lemur_jax.text.tokenizer import Tokenizer

# Tokens of the prompt that are decoded with the generated ones: the text of a token can depend on the tokens before it
# (a leading space, a character of several bytes).
CONTEXT = 8

# A decoder's text for bytes that are not a character (yet).
INCOMPLETE = "\ufffd"

_BYTE = re.compile("<0x[0-9A-F]{2}>")  # SentencePiece's spelling of a byte token


def num_settled_tokens(tokenizer: Tokenizer, tokens: Sequence[int]) -> int:
    """The number of tokens whose text no later one changes: all but the byte tokens at the end.

    SentencePiece decodes byte tokens in a row together. If they are not UTF-8, each of them becomes U+FFFD, also those
    that were valid without the next one.
    """
    count = len(tokens)
    while count and _BYTE.fullmatch(tokenizer.token(tokens[count - 1])):
        count -= 1
    return count


def continuation(tokenizer: Tokenizer, prompt: Sequence[int], tokens: Sequence[int]) -> str:
    """The text that `tokens` add to `prompt`, with the space in front if there is one."""
    start = num_settled_tokens(tokenizer, prompt[:-CONTEXT])  # not inside a character
    context = list(prompt[start:])
    prefix, text = tokenizer.decode(context), tokenizer.decode([*context, *tokens])
    if not text.startswith(prefix):  # the tokens complete a character whose first bytes the prompt has
        prefix = prefix.rstrip(INCOMPLETE)
    return text[len(prefix) :]


def spelled(tokenizer: Tokenizer, token: int) -> tuple[str, bytes]:
    """A token as text, or where it is no whole characters as OpenAI writes it, and its bytes."""
    data = tokenizer.token_bytes(token)
    try:
        return data.decode(), data
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data), data


def offsets(tokenizer: Tokenizer, prompt: Sequence[int], answer: Sequence[int], text: str) -> list[int]:
    """Where each token begins in `text`: a prompt without its control tokens, and an answer up to a stop string.

    A part of a character begins where the character does.
    """
    hidden = tokenizer.control_tokens.values()
    added = [b"" if token in hidden else tokenizer.token_bytes(token) for token in prompt]
    added += map(tokenizer.token_bytes, answer)
    pieces = list(map(codecs.getincrementaldecoder("utf-8")("replace").decode, added))
    joined = "".join(pieces)
    space = int(joined.startswith(" ") and not joined.startswith(text))  # SentencePiece's, in front of a text
    places = itertools.accumulate(map(len, pieces), initial=-space)
    return [min(max(0, place), len(text)) for _, place in zip(pieces, places, strict=False)]
