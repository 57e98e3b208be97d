"""Generated ids as text."""

import os
from collections.abc import Sequence

from lemur_jax.text.tokenizer import Tokenizer

# Tokens of the prompt that are decoded with the generated ones: the text of a token can depend on the tokens before it
# (a leading space, a character of several bytes).
CONTEXT = 8

# A decoder's text for bytes that are not a character (yet).
INCOMPLETE = "\ufffd"


def continuation(tokenizer: Tokenizer, prompt: Sequence[int], tokens: Sequence[int]) -> str:
    """The text that `tokens` add to `prompt`, with the space in front if there is one."""
    before = list(prompt[-CONTEXT:])
    whole = tokenizer.decode([*before, *tokens])
    # Not all of the prompt's text: the tokens may complete a character whose first bytes the prompt has.
    return whole[len(os.path.commonprefix([tokenizer.decode(before), whole])) :]
