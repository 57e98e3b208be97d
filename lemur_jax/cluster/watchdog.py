"""Hosts of a run that watch each other: barriers with time-outs, and an end when one is lost.

A collective waits for ever for a host that has gone. So on each host a thread beats in the key-value
store of `jax.distributed` and looks at the others' beats: a host that was killed, that hangs in the
kernel or that has been stopped does not beat, and one that failed says so. The others then print which
host it was and end with `LOST`, so that whoever launched the run can launch it again; it goes on from
the newest checkpoint. Where the other refused its config or data, they end with 2 as it does. On one host
all of this does nothing.
"""

import contextlib
import ctypes
import itertools
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from lemur_jax.common.errors import UserError

# sysexits.h: EX_TEMPFAIL, "try again".
LOST = 75

_BEATS = "lemur/beat/"
_VERDICT = "lemur/verdict"
_LEFT = "left"
_FAILED = "failed: "
_REFUSED = f" {_FAILED}{UserError.__name__}: "

_counter = itertools.count()


def client() -> Any:
    """The client of the coordination service, None on one host. JAX has no public name for it."""
    from jax._src import distributed

    return distributed.global_state.client


def process() -> tuple[int, int]:
    """(number of this process, number of processes), without touching a device."""
    from jax._src import distributed

    state = distributed.global_state
    return state.process_id, state.num_processes


def barrier(name: str, seconds: float, service: Any = None) -> None:
    """Until every host has come to this barrier.

    Args:
      name: what the hosts wait for; every host must meet the same barriers in the same order.
      seconds: how long to wait.

    Raises:
      UserError: somebody did not come in time; says who.
    """
    service = service or client()
    if service is None:
        return
    me, count = process()
    place = f"lemur/barrier/{next(_counter)}-{name}/"
    service.key_value_set(f"{place}{me}", socket.gethostname())
    deadline = time.monotonic() + seconds
    while True:
        # Looking rather than the service's own barrier: that one breaks for good once somebody is late.
        here = {int(key.removeprefix(place)) for key, _ in service.key_value_dir_get(place)}
        if len(here) == count:
            return
        if time.monotonic() > deadline:
            missing = ", ".join(describe(i, service) for i in range(count) if i not in here)
            raise UserError(f"barrier {name!r}: no sign of {missing} within {seconds:g} s")
        time.sleep(0.05)


def exchange(name: str, value: str, seconds: float) -> list[str]:
    """What every host says, by its number; on one host, what it says itself.

    Raises:
      UserError: a host says nothing in time; names it.
    """
    service = client()
    if service is None:
        return [value]
    me, count = process()
    place = f"lemur/exchange/{name}/"
    service.key_value_set(f"{place}{me}", value)
    barrier(name, seconds)
    said = dict(service.key_value_dir_get(place))
    return [said[f"{place}{host}"] for host in range(count)]


def agree(name: str, value: str, seconds: float) -> None:
    """Makes sure that every host says the same.

    Raises:
      UserError: a host says something else, or nothing in time; names it.
    """
    said = exchange(name, value, seconds)
    other = [describe(host, client()) for host in range(len(said)) if said[host] != said[0]]
    if other:
        raise UserError(
            f"{name} differs between hosts: {', '.join(other)} has another than {describe(0, client())}"
        )


def describe(host: int, service: Any) -> str:
    """`host 3 (its name)`."""
    names = dict(service.key_value_dir_get(_BEATS))
    found = names.get(f"{_BEATS}{host}", "").split(" ")
    return f"host {host} ({found[1]})" if len(found) > 2 and found[0].isdigit() else f"host {host}"


def tell(name: str, value: float) -> None:
    """Leaves a number where all hosts can read it; the last one counts. Waits for nobody."""
    if (service := client()) is not None:
        with contextlib.suppress(RuntimeError):
            service.key_value_set(f"lemur/told/{name}/{process()[0]}", repr(value), allow_overwrite=True)


def told(name: str) -> dict[int, float]:
    """What each host has told last, by its number; empty on one host."""
    place = f"lemur/told/{name}/"
    if (service := client()) is None:
        return {}
    with contextlib.suppress(RuntimeError):
        found = service.key_value_dir_get(place)
        return {int(key.removeprefix(place)): float(value) for key, value in sorted(found)}
    return {}


class Watch:
    """Who is lost, judged from beats; separate from threads and exits so that it can be tested.

    Args:
      service: has `key_value_set`, `key_value_dir_get`, `key_value_try_get`.
      me: number of this process.
      count: number of processes.
      lost_seconds: silence after which a host is lost.
      clock: seconds.
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
        self._beats = 0
        self._seen: dict[int, tuple[str, float]] = {}
        self._answered = clock()

    def look(self) -> str | None:
        """Beats once and looks at the others.

        Returns:
          Why the run is over, None as long as it is not.
        """
        self._beats += 1
        try:
            self._say(f"{self._beats} {socket.gethostname()} alive")
            heard = dict(self._service.key_value_dir_get("lemur/"))
        except RuntimeError:  # JaxRuntimeError: the service lives in host 0
            if self._clock() - self._answered < self._lost_seconds:
                return None
            return f"host 0, which coordinates, has not answered for {self._lost_seconds:g} s"
        self._answered = self._clock()
        if _VERDICT in heard:
            return heard[_VERDICT]
        for host in range(self._count):
            beat = heard.get(f"{_BEATS}{host}", "")
            if host == self._me or beat == _LEFT:
                continue
            if beat.startswith(_FAILED):
                return self._judge(f"host {host} {beat}")
            before, since = self._seen.get(host, (None, 0.0))
            if beat != before:
                self._seen[host] = (beat, self._clock())
            elif self._clock() - since >= self._lost_seconds:
                name = f" ({beat.split(' ')[1]})" if beat else ""
                return self._judge(f"host {host}{name} has not been heard of for {self._lost_seconds:g} s")
        return None

    def leave(self, error: BaseException | None = None) -> None:
        """Tells the others that this host's silence is in order, or why it fails."""
        with contextlib.suppress(RuntimeError):
            text = " ".join(str(error).split())[:300] if error else ""
            self._say(f"{_FAILED}{type(error).__name__}: {text}" if error else _LEFT)

    def _judge(self, verdict: str) -> str:
        """All hosts end with the first verdict, also those that would have seen it later."""
        with contextlib.suppress(RuntimeError):
            self._service.key_value_set(_VERDICT, verdict, allow_overwrite=True)
        return verdict

    def _say(self, beat: str) -> None:
        self._service.key_value_set(f"{_BEATS}{self._me}", beat, allow_overwrite=True)


@contextlib.contextmanager
def watched(lost_seconds: float) -> Iterator[None]:
    """Ends this process with `LOST` when another host of the run is lost or has failed inside.

    Args:
      lost_seconds: silence after which a host is lost; below it, nobody hurries.
    """
    service = client()
    if service is None:
        yield
        return
    from jax.errors import JaxRuntimeError

    me, count = process()
    if me > 0:
        _explain_abort()
    watch = Watch(service, me, count, lost_seconds)
    pause = min(2.0, lost_seconds / 5)
    done = threading.Event()

    def work() -> None:
        while not done.wait(pause):
            if verdict := watch.look():
                _end(verdict, linger=2 * pause if me == 0 else 0)

    watch.look()
    thread = threading.Thread(target=work, name="host-watch", daemon=True)
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
            time.sleep(2 * pause)  # the others read the reason here


def _end(verdict: str, linger: float) -> None:
    """Past every destructor: they would wait for the lost host.

    Host 0 carries the service and so lingers until the others have read the verdict.
    """
    print(
        f"\nlemur: {verdict}; this host stops too. Give the same command on all hosts again: a run goes on from its"
        " newest checkpoint, if there is one",
        file=sys.stderr,
        flush=True,
    )
    time.sleep(linger)
    # What one host refuses, trying again does not mend.
    os._exit(2 if _REFUSED in verdict else LOST)


@ctypes.CFUNCTYPE(None, ctypes.c_int)
def _aborted(signal_number: int) -> None:
    """Runs where C++ has called abort(): says so where the reason is that host 0 is gone."""
    from jax._src import distributed

    host, _, port = (distributed.global_state.coordinator_address or "").rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except OSError:
        _end(f"host 0 ({host}), which coordinates, is gone", linger=0)
    signal.signal(signal_number, signal.SIG_DFL)
    os.abort()


def _explain_abort() -> None:
    """JAX's client ends the process with a page of its own, status 134, as soon as host 0 is gone.

    Its callback cannot be given in Python (jaxlib has no Python type for the status that it gets), and a
    handler of Python's `signal` runs too late: so a C one.
    """
    libc = ctypes.CDLL(None)
    libc.signal.argtypes = [ctypes.c_int, type(_aborted)]
    libc.signal.restype = ctypes.c_void_p
    libc.signal(signal.SIGABRT, _aborted)
