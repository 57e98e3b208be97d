"""A workdir belongs to one config: the first run writes it down, later runs must agree."""

import json
from typing import Any

from etils import epath

from lemur_jax.common.errors import UserError
from lemur_jax.common.sections import fill
from lemur_jax.config import RunConfig, flatten, to_json
from lemur_jax.telemetry.metrics import METRICS_FILE, read_metrics
from lemur_jax.train.evaluate import unscored

# What may differ between a run and its resumption: nothing of it changes the result beyond rounding.
FREE = (
    "mesh.", "compute.", "log.", "checkpoint.", "eval.", "prepare.", "hosts.", "train.microbatches", "data.stores",
)  # fmt: skip


def check_owner(config: RunConfig, workdir: epath.PathLike) -> epath.Path:
    """That the workdir is nobody's yet, or of a run of this config; nothing is written.

    Args:
      config: the run config.
      workdir: local or gs:// directory; it need not be there.

    Raises:
      UserError: the workdir holds a run of another config; the first key that differs is named.
    """
    workdir = epath.Path(workdir)
    path = workdir / "config.json"
    if path.exists():
        theirs = fill(RunConfig, json.loads(path.read_text()))
        if difference := first_difference(theirs, to_json(config), _free(config)):
            key, old, new = difference
            raise UserError(
                f"{workdir} belongs to another config: {key} was {old!r} there and is {new!r} now;"
                " use another --workdir, or the old value to resume"
            )
    return workdir


def claim(config: RunConfig, workdir: epath.PathLike) -> epath.Path:
    """Makes the workdir this config's own, or finds that it is; one host does that.

    Args:
      config: the run config.
      workdir: local or gs:// directory; made if missing.

    Raises:
      UserError: as `check_owner`.
    """
    workdir = check_owner(config, workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    # Renamed when whole: other hosts may look at it at this very moment.
    temporary = workdir / "config.json.tmp"
    temporary.write_text(json.dumps(to_json(config), indent=2, sort_keys=True) + "\n")
    temporary.replace(workdir / "config.json")
    return workdir


def finished(config: RunConfig, workdir: epath.PathLike) -> bool:
    """Whether the checkpoint of the last step is there, and its held-out evaluation."""
    workdir, last = epath.Path(workdir), config.train.steps
    if not (workdir / "checkpoints" / str(last)).exists():
        return False
    records = read_metrics(workdir) if (workdir / METRICS_FILE).exists() else []
    return not unscored(config, records, last)


def _free(config: RunConfig) -> tuple[str, ...]:
    """What may differ from the run that is resumed."""
    return (*FREE, "optimizer.") if config.checkpoint.other_optimizer == "fresh" else FREE


def first_difference(
    old: dict[str, Any], new: dict[str, Any], free: tuple[str, ...] = FREE
) -> tuple[str, Any, Any] | None:
    """(key, old value, new value) of the first key that matters and differs."""
    old, new = flatten(old), flatten(new)
    for key in sorted(old.keys() | new.keys()):
        if key.startswith(free):
            continue
        if old.get(key) != new.get(key):
            return key, old.get(key), new.get(key)
    return None
