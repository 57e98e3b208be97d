"""What Orbax and TensorStore print about a failed save or restore besides raising it: kept off the terminal.

`Checkpoints` says of a failed save what there is to say, in one line. Several places in Orbax log the traceback of the
same error before they raise it; asyncio logs those of the writes that nobody waits for any more; and writes of
TensorStore that end later still find the event loop of the save closed. Where there are too many open files for an
event loop, asyncio tells of the loop that is half made, and of what should have run in it; so does Python of what the
threads should have run that waited for a directory in vain. That would be pages around the one line.
Whatever else is logged or cannot be raised passes.
"""

import functools
import logging
import re
import sys
import traceback
import warnings
from typing import Any

# In Orbax: file and function that log an error and raise it too.
_RAISED_TOO = {
    ("future.py", "run"),
    ("async_checkpointer.py", "_thread_func"),
    ("checkpoint_manager.py", "wait_until_finished"),
    ("checkpoint.py", "_write_and_log"),
    ("checkpoint.py", "_update_and_log"),
}
_ORBAX = "/orbax/checkpoint/"
# 'OUT_OF_RANGE: Error opening "zarr" driver: Error writing "layers.mlp.up/.zarray" in OCDBT database at "/...": ...'
_WRITE_OF_TENSORSTORE = re.compile(r"[A-Z_]+: .*\bError writing ")

_COROUTINE_OF_ORBAX = (
    r"coroutine '(cleanup_temporary_paths|is_path_finalized|run_sync\b.*|_create_paths|cancellable"
    r"|async_serialize_from_host\b.*|_async_serialize_shardings|_serialize_arrays_batches_without_dispatcher\b.*"
    r"|NumpyHandler\._background_serialize|BasePyTreeCheckpointHandler\._write_metadata_after_commits)'"
    r" was never awaited"
)


def silence_echoes() -> None:
    """From now on, for the whole process; may be called again."""
    _listen()
    # Each time: whoever keeps warnings, as test runners do, would keep with them the arrays of what was given up.
    warnings.filterwarnings("ignore", _COROUTINE_OF_ORBAX, RuntimeWarning)


@functools.cache
def _listen() -> None:
    logging.getLogger("absl").addFilter(_is_news)
    logging.getLogger("asyncio").addFilter(_is_waited_for)
    before = sys.unraisablehook
    echoes = (_is_late_write, _is_half_a_loop, _is_given_up)
    sys.unraisablehook = lambda found: None if any(is_one(found) for is_one in echoes) else before(found)


def _is_news(record: logging.LogRecord) -> bool:
    return _ORBAX not in record.pathname or (record.filename, record.funcName) not in _RAISED_TOO


def _is_waited_for(record: logging.LogRecord) -> bool:
    """Whether this is not the error of a write that was given up after the first error of the save.

    Its future is either one of Orbax or one that TensorStore ended from C++: then no frame of Python raised the error.
    """
    if "exception was never retrieved" not in record.getMessage() or not record.exc_info:
        return True
    _, error, raised_in = record.exc_info
    frames = traceback.extract_tb(raised_in)
    if not frames:
        return not _WRITE_OF_TENSORSTORE.match(str(error))
    return not any(_ORBAX in frame.filename for frame in frames)


def _is_late_write(found: Any) -> bool:
    """Whether this is a callback from C++ to an event loop that is closed: no Python code is there to be told."""
    value = found.exc_value
    return found.object is None and isinstance(value, RuntimeError) and str(value) == "Event loop is closed"


def _is_given_up(found: Any) -> bool:
    """Whether this is the error of a read or a write of Orbax that was given up after the first error."""
    code = getattr(found.object, "cr_code", None)  # of a coroutine
    return code is not None and _ORBAX in code.co_filename


def _is_half_a_loop(found: Any) -> bool:
    """Whether this is the end of an event loop that could not open its sockets, which was raised."""
    owner = getattr(found.object, "__qualname__", "")
    return owner == "BaseEventLoop.__del__" and isinstance(found.exc_value, AttributeError)
