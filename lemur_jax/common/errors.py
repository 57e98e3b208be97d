"""The one exception that means "the user can mend this", and what other errors say."""

import re


class UserError(Exception):
    """A mistake in a config, a path or a file that the user can mend.

    The message is one line: what is wrong, where, and what to do. `lemur` prints it on stderr
    without a traceback and exits with code 2.
    """

    def __init__(self, message: str):
        super().__init__(" ".join(message.split()))


def reason_of(error: BaseException, most: int = 500) -> str:
    """An error's kind and what it says, without the pages that TensorStore adds for its authors.

    Args:
      most: characters; beyond, its middle is left out: long paths there, and what went wrong at the end.
    """
    said = str(error)
    if isinstance(error, KeyError) and " " in said:  # a sentence rather than a key
        said = str(error.args[0])
    said = re.split(r" \[(?:tensorstore_spec|source locations)=| See full TensorStore details:", said)[0]
    said = f"{type(error).__name__}: {said}"
    return said if len(said) <= most else f"{said[: most // 2]} … {said[-most // 2 :]}"
