"""Requests to stop: SIGTERM, as clouds send it before they reclaim a machine, notices of the cloud, and Ctrl-C."""

import contextlib
import os
import signal
import socket
import threading
from typing import Any

import jax

from lemur_jax.cluster import coordination
from lemur_jax.cluster.exit import FAILED, end_process
from lemur_jax.cluster.maintenance import Notices


class Interruption:
    """A context in which SIGTERM, and the first SIGINT (Ctrl-C), are requests to save and stop.

    With several processes JAX's own preemption service takes SIGTERM on whichever host it arrives, and all hosts
    agree on the moment; the first Ctrl-C on any host is passed to it. A second Ctrl-C raises KeyboardInterrupt.
    Signals are handled in the main thread only; in another thread the caller's own handlers stay.

    `grace_s` seconds after SIGTERM (with several processes: after the agreed moment) the process is ended, saved or
    not; a half-written checkpoint is never seen by a reader. 0: no limit.
    """

    def __init__(self, grace_s: float):
        self._grace_s = grace_s
        self.cause = ""  # "SIGTERM" or "Ctrl-C"; empty without a request
        self._interrupts = 0
        self._timer: threading.Timer | None = None
        self._undo = contextlib.ExitStack()

    def __enter__(self) -> "Interruption":
        alone, main = jax.process_count() == 1, threading.current_thread() is threading.main_thread()
        if main:
            # None: a handler that was not installed from Python, and cannot be put back.
            if (previous := signal.getsignal(signal.SIGINT)) not in (None, signal.SIG_IGN):
                self._undo.callback(signal.signal, signal.SIGINT, previous)
                signal.signal(signal.SIGINT, self._on_sigint)
            if alone:
                self._take_sigterm()
        if main or not alone:
            self._undo.enter_context(Notices())
        return self

    def _take_sigterm(self) -> None:
        # Python runs handlers when the main thread returns from C, where a stuck save may keep it. A thread that reads
        # the numbers of signals starts the grace period at once.
        reader, writer = socket.socketpair()
        writer.setblocking(False)
        old_fd = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        previous = signal.signal(signal.SIGTERM, lambda *_: self.request("SIGTERM"))
        self._undo.callback(writer.close)
        self._undo.callback(signal.set_wakeup_fd, old_fd)
        self._undo.callback(signal.signal, signal.SIGTERM, previous)
        threading.Thread(target=self._listen, args=(reader,), daemon=True).start()

    def _listen(self, reader: socket.socket) -> None:
        with reader:
            while numbers := reader.recv(64):  # empty when the writer is closed
                if signal.SIGTERM in numbers:
                    self.request("SIGTERM")

    def __exit__(self, *_: Any) -> None:
        self._undo.close()
        if self._timer:
            self._timer.cancel()

    @property
    def requested(self) -> bool:
        """Whether a request has come, as far as this host knows."""
        return bool(self.cause)

    def should_stop(self) -> bool:
        """Whether to stop now and save; all hosts must call equally often and get the same answers.

        Call it after every step, and inside anything that takes longer.
        """
        if jax.process_count() > 1 and coordination.reached_preemption():
            self.request("SIGTERM")
        return self.requested

    def _on_sigint(self, *_: Any) -> None:
        self._interrupts += 1
        if self._interrupts > 1:
            raise KeyboardInterrupt
        # Not through `logging`: a handler may run in the middle of a write to the same stream.
        os.write(2, b"\nlemur: Ctrl-C: saves after the current step and stops; press it again to abort\n")
        if jax.process_count() > 1:
            os.kill(os.getpid(), signal.SIGTERM)  # JAX passes it to all hosts
        else:
            self.request("Ctrl-C")

    def request(self, cause: str) -> None:
        """Asks to stop, as a signal does; the first cause counts, and "SIGTERM" starts the grace period."""
        if self.requested:
            return
        self.cause = cause
        if self._grace_s and cause == "SIGTERM":
            self._timer = threading.Timer(self._grace_s, self._end)
            self._timer.daemon = True
            self._timer.start()

    def _end(self) -> None:
        end_process(
            FAILED,
            f"not saved within config.checkpoint.grace_s = {self._grace_s:g} s of SIGTERM; the newest finished"
            " checkpoint stays",
        )
