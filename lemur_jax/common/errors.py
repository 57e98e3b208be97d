"""The one exception that means "the user can mend this", and what other errors say."""

import re


class UserError(Exception):
    """A mistake in a config, a path or a file that the user can mend.

    The message is one line: what is wrong, where, and what to do. `lemur` prints it on stderr
    without a traceback and exits with code 2.
    """

    def __init__(self, message: str):
        super().__init__(" ".join(message.split()))


def reason_of(error: BaseException) -> str:
    """What an error of the storage says, without the pages that TensorStore adds for its authors."""
    reason = error.args[0] if isinstance(error, KeyError) and error.args else error
    return re.split(r" \[(?:tensorstore_spec|source locations)=", str(reason))[0]
