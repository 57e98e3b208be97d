"""Ends the hosts of a run when one of them is lost.

A collective waits forever for a lost host. So a thread of each host sends heartbeats through the key-value store of
`jax.distributed` and reads those of the others: a host that was killed, stopped or hangs sends none, and one that
failed sends its error. The others then print which host it was and end with `TRY_AGAIN`, and the launcher starts the
run again from the newest checkpoint; after a `UserError` they end with `USER_ERROR`. When host 0, the coordinator,
dies, JAX aborts the others.
"""

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from lemur_jax.cluster import coordination
from lemur_jax.cluster.exit import TRY_AGAIN, USER_ERROR, end_process
from lemur_jax.common.errors import UserError

_MAX_PAUSE = 2.0  # seconds between two heartbeats
_VERDICTS = "lemur/verdict/"  # a directory, as a single key cannot be read without waiting for it
_LEFT = "left"
_FAILED = "failed: "
_REFUSED = f" {_FAILED}{UserError.__name__}: "


class Watch:
    """Judges from heartbeats which host is lost; separate from threads and exits so that it can be tested.

    `service` is the client of the coordination service, `me` this process of `count`; a host is lost after
    `lost_seconds` of silence by `clock`, which gives seconds.
    """

    def __init__(
        self,
        service: Any,
        me: int,
        count: int,
        lost_seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._service, self._me, self._count = service, me, count
        self._lost_seconds, self._clock = lost_seconds, clock
        self._sent = 0
        self._seen: dict[int, tuple[str, float]] = {}
        self._answered = clock()

    def look(self) -> str | None:
        """Sends a heartbeat and reads those of the others; returns why the run is over, None if it is not."""
        self._sent += 1
        try:
            coordination.send_heartbeat(self._me, f"{self._sent} {socket.gethostname()} alive", self._service)
            verdicts = self._service.key_value_dir_get(_VERDICTS)
            heartbeats = coordination.read_heartbeats(self._service)
        except RuntimeError:  # JaxRuntimeError: the service is part of host 0
            if self._clock() - self._answered < self._lost_seconds:
                return None
            return f"host 0, which coordinates, has not answered for {self._lost_seconds:g} s"
        self._answered = self._clock()
        if verdicts:
            return verdicts[0][1]
        for host in range(self._count):
            heartbeat = heartbeats.get(host, "")
            if host == self._me or heartbeat == _LEFT:
                continue
            if heartbeat.startswith(_FAILED):
                return _send_verdict(f"host {host} {heartbeat}", self._service)
            previous, since = self._seen.get(host, (None, 0.0))
            if heartbeat != previous:
                self._seen[host] = (heartbeat, self._clock())
            elif self._clock() - since >= self._lost_seconds:
                name = coordination.host_name(host, self._service)
                return _send_verdict(
                    f"{name} has not been heard of for {self._lost_seconds:g} s", self._service
                )
        return None

    def leave(self, error: BaseException | None = None) -> None:
        """Tells the other hosts that this one has ended normally, or why it failed."""
        text = _LEFT
        if error is not None:
            name = (UserError if isinstance(error, UserError) else type(error)).__name__
            text = f"{_FAILED}{name}: {' '.join(str(error).split())[:300]}"
        with contextlib.suppress(RuntimeError):
            coordination.send_heartbeat(self._me, text, self._service)


def _send_verdict(verdict: str, service: Any) -> str:
    """Publishes a verdict: all hosts end with it, also those that would have noticed later."""
    with contextlib.suppress(RuntimeError):
        service.key_value_set(f"{_VERDICTS}first", verdict, allow_overwrite=True)
    return verdict


@contextlib.contextmanager
def host_watchdog(lost_seconds: float) -> Iterator[None]:
    """A context in which this process ends when another host fails, or is silent for `lost_seconds`."""
    service = coordination.client()
    if service is None:
        yield
        return
    from jax.errors import JaxRuntimeError

    me, count = coordination.process()
    watch = Watch(service, me, count, lost_seconds)
    pause = min(_MAX_PAUSE, lost_seconds / 5)
    done = threading.Event()

    def work() -> None:
        while not done.wait(pause):
            if verdict := watch.look():
                _end(verdict, linger_seconds=2 * pause if me == 0 else 0)

    watch.look()
    thread = threading.Thread(target=work, name="host-watchdog", daemon=True)
    thread.start()
    error: BaseException | None = None
    try:
        yield
    except JaxRuntimeError as caught:
        # A collective notices a dead host before its silence is long enough: wait for its name.
        error = caught
        thread.join(lost_seconds + 2 * pause)
        raise
    except BaseException as caught:
        error = caught
        raise
    finally:
        done.set()
        thread.join()
        watch.leave(error)
        if error is not None and me == 0:
            time.sleep(2 * pause)  # host 0 runs the service: the others read the reason meanwhile


def end_all_hosts(reason: str) -> NoReturn:
    """Ends this process at once, and by their watchdogs those of all other hosts, with `TRY_AGAIN`.

    For failures after which the other hosts would wait for this one.
    """
    me, _ = coordination.process()
    verdict = f"host {me} {_FAILED}{' '.join(reason.split())}"
    _send_verdict(verdict, coordination.client())
    _end(verdict, linger_seconds=2 * _MAX_PAUSE if me == 0 else 0)


def _end(verdict: str, linger_seconds: float) -> NoReturn:
    # Host 0 runs the service and waits until the others have read the verdict.
    end_process(
        USER_ERROR if _REFUSED in verdict else TRY_AGAIN,
        f"{verdict}; this host stops too. Run the same command on all hosts again: a run resumes from its newest"
        " checkpoint, if there is one",
        linger_seconds,
    )
