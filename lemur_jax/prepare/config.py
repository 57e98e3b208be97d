"""`config.prepare`: how the token stores are made."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from lemur_jax.common.sections import require


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """Options of `lemur prepare`; training does not read them."""

    workers: int = 0  # processes; 0: one a core
    held_out_tasks: tuple[str, ...] = ()  # tasks of which only the validation split is prepared
    max_bad_share: float = 0.01  # share of bad records above which preparing fails
    steps: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # task -> cleaning and code steps

    def __post_init__(self):
        require(self.workers >= 0, "prepare.workers", self.workers, "0 (one a core) or more")
        require(0 <= self.max_bad_share <= 1, "prepare.max_bad_share", self.max_bad_share, "between 0 and 1")
