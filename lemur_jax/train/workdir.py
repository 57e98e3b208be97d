"""A workdir belongs to one config: the first run writes it down, later runs must agree or extend it."""

import json
from collections.abc import Mapping
from typing import Any

from etils import epath

from lemur_jax.common.errors import UserError
from lemur_jax.common.sections import fill
from lemur_jax.config import RunConfig, flatten

Changes = Mapping[str, tuple[Any, Any]]  # dotted key -> (value of the run, value now)

# What may differ between a run and its resumption: it affects no result (up to rounding).
FREE = (
    "mesh.", "compute.", "log.", "checkpoint.", "eval.", "prepare.", "hosts.", "train.microbatches", "data.stores",
    "data.mixture",  # its sources count
)  # fmt: skip
# What may also differ with --extend: it affects the steps after the newest checkpoint alone.
EXTENDABLE = ("train.steps", "optimizer.", "spikes.", "data.sources.", "data.stages.")


def config_changes(values: Mapping[str, Any], workdir: epath.Path, *, extend: bool = False) -> Changes:
    """How a config differs from the one that the workdir belongs to; nothing is written.

    Args:
      values: the config as JSON (`config.to_json`).
      workdir: local or gs:// directory; it need not exist.
      extend: accept changes of `EXTENDABLE` keys.

    Returns:
      Only changes that affect results; empty where the workdir belongs to no config.

    Raises:
      UserError: the configs differ in keys that may not change. All of them are named.
    """
    path = workdir / "config.json"
    if not path.exists():
        return {}
    free = (*FREE, "optimizer.") if values["checkpoint"]["other_optimizer"] == "fresh" else FREE
    changes = differences(fill(RunConfig, json.loads(path.read_text())), values, free)
    fixed = {key: pair for key, pair in changes.items() if not (extend and key.startswith(EXTENDABLE))}
    if fixed:
        listed = "; ".join(f"{key} was {old!r} there and is {new!r} now" for key, (old, new) in fixed.items())
        way_out = "use the old values to resume, or another --workdir"
        if all(key.startswith(EXTENDABLE) for key in fixed):
            way_out += ", or --extend to apply them from the newest checkpoint on"
        raise UserError(f"{workdir} belongs to another config: {listed}; {way_out}")
    return changes


def check_changes(changes: Changes, values: Mapping[str, Any], step: int) -> None:
    """Refuses changes that would have affected updates before `step`, which are made already.

    A source may be added with share 0; a stage may be added, removed or changed from `step` on.

    Args:
      changes: from `config_changes`.
      values: the config as JSON.
      step: of the newest checkpoint.

    Raises:
      UserError: naming the key.
    """
    for key, (old, new) in changes.items():
        if key.startswith("data.sources.") and not key.endswith(".max_epochs"):
            added = old is None and (not key.endswith(".share") or new == 0)
            if not added:
                raise UserError(
                    f"--extend cannot change {key} from {old!r} to {new!r}, because {step} updates are made: give"
                    " new shares in config.data.stages, and new sources the share 0"
                )
        if key.startswith("data.stages."):
            name = key.removeprefix("data.stages.").rpartition(".shares.")[0] or key.split(".")[2]
            begins = [value for value in changes.get(f"data.stages.{name}.step", ()) if value is not None]
            begins = begins or [values["data"]["stages"][name]["step"]]
            if min(begins) < step:
                raise UserError(f"--extend cannot change {key}: the stage begins before step {step}")


def claim(values: Mapping[str, Any], workdir: epath.Path) -> None:
    """Writes the config that the workdir belongs to from now on; the primary host calls it."""
    workdir.mkdir(parents=True, exist_ok=True)
    # Renamed when whole: other hosts may read it at the same time.
    temporary = workdir / "config.json.tmp"
    temporary.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")
    temporary.replace(workdir / "config.json")


def differences(old: Mapping[str, Any], new: Mapping[str, Any], free: tuple[str, ...] = FREE) -> Changes:
    """Keys that differ, but for those that start with a word of `free`; None stands for a missing value."""
    before, now = ({key: value for key, value in flatten(tree).items() if value != {}} for tree in (old, new))
    return {
        key: (before.get(key), now.get(key))
        for key in sorted(before.keys() | now.keys())
        if not key.startswith(free) and before.get(key) != now.get(key)
    }
