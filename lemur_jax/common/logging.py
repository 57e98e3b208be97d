"""The one formatter for the terminal of what the package logs.

Modules use `logging.getLogger(__name__)`. The command line calls `setup` once; a program that imports the package
configures the logger `lemur_jax` as it likes.
"""

import contextlib
import io
import logging
import os
import sys
from typing import TextIO


class TerminalHandler(logging.Handler):
    """Prints INFO as it is on standard output, and WARNING and above with their level on standard error.

    A progress bar of tqdm is redrawn below the line. A reader of the stream that disconnects, or a full disk behind
    it, does not raise.
    """

    def emit(self, record: logging.LogRecord) -> None:
        """Writes one record."""
        text = record.getMessage()
        if record.levelno >= logging.WARNING:
            _write(f"{record.levelname.lower()}: {text}", sys.stderr)
        else:
            _write(text, sys.stdout)


def _write(line: str, stream: TextIO | None) -> None:
    if stream is None or stream.closed:
        return
    try:
        if "tqdm" in sys.modules:
            from tqdm import tqdm

            tqdm.write(line, file=stream)
        else:
            stream.write(line + "\n")
        stream.flush()
    except BrokenPipeError:
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    except OSError:  # a full disk: the stream keeps the line and writes it later
        pass


def setup() -> None:
    """Makes the package's loggers print to the terminal; characters that its encoding lacks are escaped."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    logger = logging.getLogger("lemur_jax")
    logger.setLevel(logging.INFO)
    if not any(isinstance(handler, TerminalHandler) for handler in logger.handlers):
        logger.addHandler(TerminalHandler())
