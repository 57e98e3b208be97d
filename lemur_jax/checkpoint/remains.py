"""What is left of a save that failed: threads of Orbax that wait, arrays that they hold, directories half written."""

import contextlib
import threading
import time
import traceback

import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint._src.futures import future, synchronization

# A thread that still writes may do so for a while.
_LAST_WRITES_SECONDS = 10.0


def newest_save() -> str:
    """Orbax's number of the save that this process has begun last; local checkpoints are counted, too."""
    return synchronization.OperationIdGenerator.get_current_operation_id()


def _threads(save: str) -> list[future._SignalingThread]:
    return [
        thread
        for thread in threading.enumerate()
        if isinstance(thread, future._SignalingThread) and thread._operation_id == save
    ]


def release(save: str) -> None:
    """Ends the threads of a failed save that wait until its directories are made.

    If these could not be made, the threads would wait five more minutes, as long keep the copied arrays in memory, and
    keep the process from ending. On several hosts this ends the wait of all: the save has failed for all of them.

    Args:
      save: its number, by `newest_save`.
    """
    waiting = [
        thread for thread in _threads(save) if getattr(thread, "loop", None) is None
    ]  # it writes with one
    for thread in waiting:
        thread.cancel()
    if waiting:
        signals = {signal for thread in waiting for signal in thread._receive_signals}
        future.set_signals(list(signals), operation_id=save)


def let_go(error: BaseException | None, manager: ocp.CheckpointManager) -> None:
    """Lets go of the arrays of a failed save.

    Errors know the frames that they came through, and these the arrays; Orbax keeps a save's futures with theirs until
    the next save.
    """
    while error:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
    with contextlib.suppress(AttributeError):
        manager._checkpointer._async_manager._commit_futures = None


def remove_half_written(path: epath.Path, save: str) -> None:
    """Removes what failed saves have left in a checkpoint directory, until nothing of it comes back.

    The first error ends Orbax's wait, while its other threads, and TensorStore's behind them, may still be at it.

    Args:
      path: the checkpoint directory.
      save: number of the last one.
    """
    deadline = time.monotonic() + _LAST_WRITES_SECONDS
    for thread in _threads(save):
        # Orbax's own `join` raises the thread's error, which is reported already.
        threading.Thread.join(thread, max(0.0, deadline - time.monotonic()))
    while leftovers := list(path.glob("*.orbax-checkpoint-tmp*")):
        for leftover in leftovers:
            # A file that is written while its directory is emptied.
            with contextlib.suppress(OSError):
                leftover.rmtree(missing_ok=True)
        if time.monotonic() > deadline:
            break
        time.sleep(0.1)
