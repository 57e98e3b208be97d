"""The exception for user errors, and short texts of other errors."""

import re


class UserError(Exception):
    """An error that the user can fix; its message is one line: what is wrong, where, and what to do.

    `lemur` prints it on stderr without a traceback and exits with code 2.
    """

    def __init__(self, message: str):
        super().__init__(" ".join(message.split()))


class Diverged(UserError):
    """A run's loss or gradient is not finite, or it was rolled back too often."""


def reason_of(error: BaseException, most: int = 500) -> str:
    """An error's class and message, without TensorStore's details; above `most` characters the middle is left out."""
    text = str(error)
    if isinstance(error, KeyError) and " " in text:  # a sentence rather than a key
        text = str(error.args[0])
    text = re.split(r" \[(?:tensorstore_spec|source locations)=| See full TensorStore details:", text)[0]
    text = f"{type(error).__name__}: {text}"
    return text if len(text) <= most else f"{text[: most // 2]} … {text[-most // 2 :]}"
