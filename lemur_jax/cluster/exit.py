"""How a process of lemur ends: the exit statuses, and the one way to end at once."""

import contextlib
import os
import sys
import time
from typing import NoReturn

# docs/reliability.md has the table for users.
FAILED = 1  # what was looked at is damaged, a save missed its grace period, or an unexpected error
USER_ERROR = 2  # one line says what to change; trying again does not help
TRY_AGAIN = 75  # EX_TEMPFAIL of sysexits.h: the same command resumes from the newest checkpoint
INTERRUPTED = 130  # Ctrl-C, as shells report SIGINT
NO_READER = 141  # the reader of standard output disconnected, as shells report SIGPIPE


def end_process(status: int, message: str = "", linger_seconds: float = 0.0) -> NoReturn:
    """Ends the process at once, without destructors, which could wait forever for a host or a save.

    A process of several must fail so: the shutdown of `jax.distributed` would wait for hosts that may be in a
    collective with it, and then abort with a status of its own.

    Prints `message` to standard error, and waits `linger_seconds` before the end.
    """
    with contextlib.suppress(OSError, ValueError):
        if message:
            print(f"\nlemur: {message}", file=sys.stderr)
    time.sleep(linger_seconds)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()
    os._exit(status)
