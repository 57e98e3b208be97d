"""The one exception that means "the user can mend this"."""


class UserError(Exception):
    """A mistake in a config, a path or a file that the user can mend.

    The message is one line: what is wrong, where, and what to do. `lemur` prints it on stderr
    without a traceback and exits with code 2.
    """

    def __init__(self, message: str):
        super().__init__(" ".join(message.split()))
