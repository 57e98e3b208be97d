"""`config.hosts`: how long the hosts of a run wait for each other."""

import dataclasses

from lemur_jax.common.sections import require


@dataclasses.dataclass(frozen=True, kw_only=True)
class HostsConfig:
    """Runs of several hosts."""

    connect_seconds: int = 300  # how long hosts wait for each other at the start
    lost_seconds: int = 100  # a host without a heartbeat for this long is lost, and the others stop

    def __post_init__(self):
        for key in ("connect_seconds", "lost_seconds"):
            require(getattr(self, key) >= 1, f"hosts.{key}", getattr(self, key), "at least 1")
