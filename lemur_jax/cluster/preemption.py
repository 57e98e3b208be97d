"""Requests to stop: SIGTERM, as clouds send it before they take a machine, or what `notices` makes one."""

import contextlib
import itertools
import os
import signal
import socket
import sys
import threading

import jax
from jax.experimental import multihost_utils

from lemur_jax.cluster.maintenance import Notices

# JAX's service takes the next number after the highest that any host has asked with, once in the life of a process, and
# tells hosts that ask with that very number. So they count how often they have asked, over all runs of a process.
_polls = itertools.count(1)


class Interruption:
    """A context in which SIGTERM is a request to save and stop.

    With one process the signal is taken here. With several, JAX's own preemption service takes it on
    whichever host it arrives, and all hosts agree on the moment.

    Args:
      grace_s: seconds from the signal (with several processes: from the agreed moment) until the process is
        ended, saved or not; what is half saved is never seen by a reader. 0: no limit.
    """

    def __init__(self, grace_s: float):
        self._grace_s = grace_s
        self._asked = False
        self._timer: threading.Timer | None = None
        self._undo = contextlib.ExitStack()

    def __enter__(self) -> "Interruption":
        if jax.process_count() == 1:
            if threading.current_thread() is not threading.main_thread():
                return self  # signals can be taken in the main thread alone; here the caller's own handling stays
            self._take_signals()
        self._undo.enter_context(Notices())
        return self

    def _take_signals(self) -> None:
        # Python calls a handler when its main thread is back from the device or the disk, which may be late.
        # A thread that waits for the number of the signal starts the period of grace at once.
        heard, number = socket.socketpair()
        number.setblocking(False)
        before = signal.set_wakeup_fd(number.fileno(), warn_on_full_buffer=False)
        old = signal.signal(signal.SIGTERM, lambda *_: None)
        threading.Thread(target=self._listen, args=(heard,), daemon=True).start()
        self._undo.callback(number.close)
        self._undo.callback(signal.set_wakeup_fd, before)
        self._undo.callback(signal.signal, signal.SIGTERM, old)

    def __exit__(self, *_) -> None:
        self._undo.close()
        if self._timer:
            self._timer.cancel()

    def _listen(self, heard: socket.socket) -> None:
        with heard:
            while numbers := heard.recv(64):  # none when the other end is closed
                if signal.SIGTERM in numbers:
                    self._ask()

    @property
    def asked(self) -> bool:
        """Whether the signal has come."""
        return self._asked

    def reached(self) -> bool:
        """Whether to stop now and save; all hosts must ask equally often and get the same answers.

        After every step, and inside whatever takes longer than one.
        """
        if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(next(_polls)):
            self._ask()
        return self._asked

    def _ask(self) -> None:
        if self._asked:
            return
        self._asked = True
        if self._grace_s:
            self._timer = threading.Timer(self._grace_s, self._give_up)
            self._timer.daemon = True
            self._timer.start()

    def _give_up(self) -> None:
        print(
            f"lemur train: not saved within config.checkpoint.grace_s = {self._grace_s:g} s of SIGTERM; the"
            " newest finished checkpoint stays",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)
