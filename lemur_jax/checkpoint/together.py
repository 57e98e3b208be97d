"""The barriers of a save on several hosts, which end at once when a host could not write.

Orbax lets hosts that have written wait 20 minutes for one that has not. Then it knows no more than that it did not
come, and the barriers of that step are out of step for good. But the host that failed goes on to a later barrier of the
same save: whoever waits at one that it has left out knows by that, and reads there why.
"""

import itertools
import sys
import time
from typing import Any

from orbax.checkpoint import multihost

from lemur_jax.checkpoint.remains import newest_save, release
from lemur_jax.cluster import coordination
from lemur_jax.common.errors import reason_of

# In the order in which a save comes to them; the last two are those of its end, also of a failed one.
_START, _END = (
    "ThreadSaveMultiHostValueHolder:set_value_start",
    "ThreadSaveMultiHostValueHolder:set_value_end",
)
_PHASES = (
    (_START, 0),
    (_END, 0),
    ("async_write_complete", 0),
    ("async_commit_complete", 0),
    (_START, 1),
    (_END, 1),
)
_FAILED = _PHASES.index((_START, 1))
_FAILURE_SECONDS = 10.0  # so long hosts may take to come to the end of a save that failed everywhere
_LONGEST_LOOK = 1.0  # seconds between two looks at who has come

_managers = itertools.count()


class ElsewhereError(RuntimeError):
    """Another host could not write its part; says which, and why."""


def why(error: Exception) -> str:
    """What a save failed by; another host's error with the name of that host."""
    return str(error) if isinstance(error, ElsewhereError) else reason_of(error)


class SaveBarriers:
    """What Orbax is to wait with between hosts (`AsyncOptions.barrier_sync_fn`).

    Every host makes one for the same manager, in the same order, and calls `begin` before the same saves, and `begun`
    when they go on by themselves.
    """

    def __init__(self, service: Any = None):
        self._service = coordination.client() if service is None else service
        self._name = f"lemur/save/{next(_managers)}"
        self._save = 0
        self._times: dict[str, int] = {}
        self._before = self._running = ""  # saves by their numbers in Orbax

    def begin(self) -> None:
        """The next save begins."""
        self._save += 1
        self._times = {}
        self._before, self._running = newest_save(), ""
        ended = self._save - 2  # by all hosts: each waits for the others at the end of a save
        if self._service is not None and ended > 0 and coordination.process()[0] == 0:
            self._service.key_value_delete(f"{self._name}/{ended}/")

    def begun(self) -> None:
        """Orbax has begun it, and goes on by itself."""
        self._running = newest_save()

    @property
    def save(self) -> str:
        """The last save by its number in Orbax; empty before there is one."""
        save = self._running or newest_save()
        return "" if save == self._before else save

    def fail(self, error: Exception) -> bool:
        """This host could not begin the save; returns whether all hosts know, and go on without it.

        Otherwise one is in a collective of Orbax's and waits there for this host, for ever.
        """
        release(self.save)
        if self._service is None:
            return True
        self._come(_FAILED, error)
        self._come(_FAILED + 1, error)
        deadline = time.monotonic() + _FAILURE_SECONDS
        while self._missing(_FAILED):
            if time.monotonic() > deadline:
                return False
            time.sleep(0.1)
        return True

    def __call__(self, *, key: str, timeout_ms: int) -> None:
        """Until every host has come to this barrier.

        Raises:
          ElsewhereError: one has left it out.
          TimeoutError: one has not come in time.
        """
        error = sys.exc_info()[1]  # Orbax ends a failed save inside `finally`
        if error is not None:
            release(self.save)
        if self._service is None:
            return
        name = next((name for name, _ in _PHASES if name in key), "")
        self._times[name] = self._times.get(name, -1) + 1
        if (name, self._times[name]) not in _PHASES:  # not of a save
            multihost.get_barrier_sync_fn()(key=key, timeout_ms=timeout_ms)
            return
        phase = _PHASES.index((name, self._times[name]))
        self._come(phase, error)
        deadline, pause = time.monotonic() + timeout_ms / 1000, 0.01
        while missing := self._missing(phase):
            if time.monotonic() > deadline:
                hosts = ", ".join(coordination.host_name(host, self._service) for host in missing)
                raise TimeoutError(f"no sign of {hosts} within {timeout_ms / 1000:g} s")
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_LOOK)

    def _come(self, phase: int, error: BaseException | None) -> None:
        if error is None or isinstance(error, ElsewhereError):
            reason = "" if error is None else str(error)
        else:
            me = coordination.host_name(coordination.process()[0], self._service)
            reason = f"{me}: {reason_of(error)}"
        place = f"{self._name}/{self._save}/{phase}/{coordination.process()[0]}"
        self._service.key_value_set(place, reason, allow_overwrite=True)

    def _missing(self, phase: int) -> list[int]:
        """The hosts that have not come to this barrier yet; raises if one never will."""
        place = f"{self._name}/{self._save}/"
        came: dict[int, dict[int, str]] = {}
        for key, reason in self._service.key_value_dir_get(place):
            at, host = map(int, key.removeprefix(place).split("/"))
            came.setdefault(at, {})[host] = reason
        missing = [host for host in range(coordination.process()[1]) if host not in came.get(phase, {})]
        for later, reasons in came.items():
            if later > phase and (left := set(missing) & reasons.keys()):
                host = min(left)
                raise ElsewhereError(
                    reasons[host] or f"{coordination.host_name(host, self._service)} has given up"
                )
        return missing
