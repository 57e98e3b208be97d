"""Ids of text in which control tokens are spelled out, as chat templates write them."""

import functools
import re

from lemur_jax.text.tokenizer import Tokenizer


def encode_with_control(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of a text whose control tokens become themselves; the text between them is encoded as plain text.

    For text that a program has rendered, e.g. with a chat template; never for what a user typed.
    """
    ids: list[int] = []
    for position, part in enumerate(_control_tokens(tuple(tokenizer.control_tokens)).split(text)):
        if part in tokenizer.control_tokens:
            ids.append(tokenizer.control_tokens[part])
        elif part:
            # The dummy space goes in front of text that opens the whole alone.
            ids += tokenizer.encode(part, prefix=position == 0)
    return ids


@functools.lru_cache(maxsize=16)
def _control_tokens(names: tuple[str, ...]) -> re.Pattern[str]:
    # Longest first: one token may begin with another. The group keeps them in the split.
    return re.compile("(" + "|".join(map(re.escape, sorted(names, key=len, reverse=True))) + ")")
