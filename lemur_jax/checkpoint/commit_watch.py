"""Saves of several hosts: where one fails, all hosts end, and the run is started again.

Orbax commits a save after barriers in a background thread of each host. Where that thread fails on one host, the others
wait at the next barrier until its time limit, and the failed host at another one. Orbax cannot abandon such a save.
"""

import threading
from typing import Any

import orbax.checkpoint as ocp
from etils import epath

from lemur_jax.cluster.watchdog import end_all_hosts

_THREAD = "async_save"  # Orbax's name of the thread that writes and commits
_LAST_BARRIER = "async_commit_complete"  # part of the key of the barrier after the commit


class CommitWatch:
    """Ends all hosts where Orbax's thread ends on this host before the save is committed.

    If Orbax renames its thread or its barrier, every save on several hosts ends the run: loud rather than a hang.

    Args:
      path: checkpoint directory, for the message.
    """

    def __init__(self, path: epath.Path):
        self._path = path
        self._barrier = ocp.multihost.get_barrier_sync_fn()
        self._committed = threading.Event()

    def barrier(self, *, key: str, timeout_ms: int) -> None:
        """For `AsyncOptions.barrier_sync_fn`."""
        self._barrier(key=key, timeout_ms=timeout_ms)
        if _LAST_BARRIER in key:
            self._committed.set()

    def expect_commit(self) -> None:
        """Call before a save starts; the one before must be finished."""
        self._committed = threading.Event()

    def start(self, step: int) -> None:
        """Call after a save has started: watches it in a thread."""
        writers = [thread for thread in threading.enumerate() if thread.name == _THREAD]
        arguments: tuple[Any, ...] = (step, writers, self._committed)
        threading.Thread(target=self._watch, args=arguments, name="commit-watch", daemon=True).start()

    def _watch(self, step: int, writers: list[threading.Thread], committed: threading.Event) -> None:
        for writer in writers:
            writer.join()
        if not committed.is_set():
            end_all_hosts(f"the checkpoint of step {step} could not be saved in {self._path}")
