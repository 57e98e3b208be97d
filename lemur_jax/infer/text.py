"""Generated ids as text."""

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
    shown, whole = tokenizer.decode(before), tokenizer.decode([*before, *tokens])
    if not whole.startswith(shown):  # the tokens complete a character whose first bytes the prompt has
        shown = shown.rstrip(INCOMPLETE)
    return whole[len(shown) :]
