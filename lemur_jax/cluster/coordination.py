"""The coordination service of `jax.distributed`: a key-value store, barriers, and agreement on when to stop.

The only file of this package that uses a private name of another library: JAX has no public name for the client of
its coordination service. On one host every function returns at once.
"""

import contextlib
import itertools
import sys
import time
from typing import Any

from lemur_jax.common.errors import UserError

_HEARTBEATS = "lemur/heartbeat/"

_exchanges, _texts = itertools.count(), itertools.count()
# The service stops all hosts at the step after the highest that any host has polled with, once in the life of a
# process, and compares for equality. So the hosts count their polls, over all runs of a process.
_sync_points = itertools.count(1)


def client() -> Any:
    """The client of the coordination service, None on one host."""
    if "jax" not in sys.modules:
        return None
    from jax._src import distributed

    return distributed.global_state.client


def process() -> tuple[int, int]:
    """(index of this process, number of processes), without initializing devices."""
    from jax._src import distributed

    state = distributed.global_state
    return state.process_id, state.num_processes


def barrier(name: str, seconds: float) -> None:
    """Waits until every host has reached this barrier; all hosts must meet the same barriers in the same order.

    Raises UserError, which names the host, if one does not come within `seconds`.
    """
    exchange(name, "here", seconds)


def exchange(name: str, value: str, seconds: float) -> list[str]:
    """Waits as `barrier`, and returns the value of every host, by its index; UserError as there."""
    service = client()
    if service is None:
        return [value]
    me, count = process()
    prefix = f"lemur/exchange/{next(_exchanges)}-{name}/"
    service.key_value_set(f"{prefix}{me}", value)
    deadline = time.monotonic() + seconds
    while True:
        # Polling, as the service's own barrier fails permanently once a host is late.
        values = {int(key.removeprefix(prefix)): text for key, text in service.key_value_dir_get(prefix)}
        if len(values) == count:
            return [values[host] for host in range(count)]
        if time.monotonic() > deadline:
            missing = ", ".join(host_name(i, service) for i in range(count) if i not in values)
            raise UserError(f"barrier {name!r}: no sign of {missing} within {seconds:g} s")
        time.sleep(0.05)


def from_primary(text: str) -> str:
    """The primary host's `text`, on every host. The others wait for it, and their own is ignored."""
    service = client()
    if service is None:
        return text
    index = next(_texts)
    prefix = f"lemur/text/{index}/"
    if process()[0] == 0:
        service.key_value_set(f"{prefix}0", text)
    while not (entries := service.key_value_dir_get(prefix)):
        time.sleep(0.05)
    # All hosts have read the text before the last, if they synchronize between two calls.
    service.key_value_delete(f"lemur/text/{index - 2}/")
    return entries[0][1]


def host_name(host: int, service: Any) -> str:
    """`host 3 (its name)`, where the host has sent a heartbeat."""
    fields = read_heartbeats(service).get(host, "").split(" ")
    return f"host {host} ({fields[1]})" if len(fields) > 2 and fields[0].isdigit() else f"host {host}"


def send_heartbeat(host: int, text: str, service: Any) -> None:
    """Replaces the heartbeat of a host."""
    service.key_value_set(f"{_HEARTBEATS}{host}", text, allow_overwrite=True)


def read_heartbeats(service: Any) -> dict[int, str]:
    """The last heartbeat of every host that has sent one."""
    return {int(key.removeprefix(_HEARTBEATS)): text for key, text in service.key_value_dir_get(_HEARTBEATS)}


def publish(name: str, value: float) -> None:
    """Publishes a number of this host to all hosts, replacing the last one; does not wait."""
    if (service := client()) is not None:
        with contextlib.suppress(RuntimeError):
            service.key_value_set(f"lemur/value/{name}/{process()[0]}", repr(value), allow_overwrite=True)


def published(name: str) -> dict[int, float]:
    """The last number that each host has published, by its index; empty on one host."""
    prefix = f"lemur/value/{name}/"
    if (service := client()) is None:
        return {}
    with contextlib.suppress(RuntimeError):
        entries = service.key_value_dir_get(prefix)
        return {int(key.removeprefix(prefix)): float(value) for key, value in sorted(entries)}
    return {}


def reached_preemption() -> bool:
    """Whether a host of several got SIGTERM; all must call equally often, and get the same answer."""
    from jax.experimental import multihost_utils

    return bool(multihost_utils.reached_preemption_sync_point(next(_sync_points)))
