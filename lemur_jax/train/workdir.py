"""A workdir belongs to one config: the first run writes it down, later runs must agree or extend it."""

import contextlib
import json
import math
from collections.abc import Mapping
from typing import Any

from etils import epath

from lemur_jax.cluster.hosts import alone
from lemur_jax.common.errors import UserError
from lemur_jax.common.json_files import write_json
from lemur_jax.common.sections import fill
from lemur_jax.config import RunConfig, differences
from lemur_jax.train.config import NOT_ADDITIVE

Changes = Mapping[str, tuple[Any, Any]]  # as of `config.differences`: of the run, and now

# What may differ between a run and its resumption: it affects no result (up to rounding).
FREE = (
    "mesh.", "compute.", "log.", "checkpoint.", "eval.", "prepare.", "hosts.", "data.stores",
    "data.modules", "data.mixture", "tokenizer.",  # the sources themselves count, and know their tokenizer
    "rl.data", "rl.eval_", "rl.max_logprob_gap",
)  # fmt: skip
# These of them are logged and recorded: they affect rounding more than a mesh does.
RECORDED = ("compute.dtype", "compute.product_dtype", "compute.reduce_dtype")
# Paths of models, whose digests the checkpoints have.
MODELS = ("init.checkpoint", "distill.teacher")
# What may also differ with --extend: it affects the steps after the newest checkpoint alone.
EXTENDABLE = (
    "train.steps", "train.microbatches", "optimizer.", "spikes.", "data.sources.", "data.stages.",
    "checkpoint.every_steps",  # to which `spikes.rollback_after` returns
)  # fmt: skip


def read_config(workdir: epath.Path) -> dict[str, Any]:
    """The config that a workdir belongs to, as JSON; empty where it belongs to none. UserError: the file is damaged."""
    path = workdir / "config.json"
    try:
        config = json.loads(path.read_text()) if path.exists() else {}
    except ValueError:
        config = None
    if not isinstance(config, dict):
        raise UserError(f"{path} is not JSON of a config: restore or remove it")
    return config


def _is_free(key: str, values: Mapping[str, Any]) -> bool:
    """Whether a key may differ at any start, silently."""
    if key == "train.microbatches":  # where no mean is of one microbatch
        return not (values["preference"]["loss"] in NOT_ADDITIVE or values["model"]["num_experts"])
    if key == "checkpoint.every_steps":
        return not values["spikes"]["rollback_after"]
    if key == "compute.param_dtype":  # the parameters in the checkpoints have it
        return False
    return key.startswith(FREE) and key not in RECORDED


def config_changes(values: Mapping[str, Any], workdir: epath.Path, *, extend: bool = False) -> Changes:
    """How a config, as JSON, differs from the one that the workdir belongs to; nothing is written.

    Only changes that affect results, and models at another path; empty where the workdir belongs to no config. A
    UserError names all keys that may not change; those of `RECORDED` may, those of `MODELS` to another path of the same
    model, and with `extend` those of `EXTENDABLE`.
    """
    from lemur_jax.checkpoint.reading import newest_metadata  # `lemur report` needs no Orbax

    newest = newest_metadata(workdir / "checkpoints")
    stored, origins = read_config(workdir) or newest.get("config"), newest.get("origins", {})
    if not stored:
        return {}
    if "train" not in stored:
        raise UserError(f"{workdir}/config.json is not that of a run: use another --workdir")
    stored = json.loads(json.dumps(fill(RunConfig, stored)))  # defaults have tuples
    changes = {key: pair for key, pair in differences(stored, values).items() if not _is_free(key, values)}
    moved = [key for key in MODELS if key in changes and _is_same_model(changes[key][1], origins.get(key))]
    allowed = (*RECORDED, *moved, *(EXTENDABLE if extend else ()))
    if values["checkpoint"]["other_optimizer"] == "fresh":
        allowed = (*allowed, "optimizer.")
    fixed = {key: pair for key, pair in changes.items() if not key.startswith(allowed)}
    if fixed:
        listed = "; ".join(f"{key} was {old!r} there and is {new!r} now" for key, (old, new) in fixed.items())
        hint = "use the old values to resume, or another --workdir"
        if all(key.startswith(EXTENDABLE) for key in fixed):
            hint += ", or --extend to apply them from the newest checkpoint on"
        raise UserError(f"{workdir} belongs to another config: {listed}; {hint}")
    return changes


def _is_same_model(path: str, origin: Mapping[str, Any] | None) -> bool:
    """Whether a path names the model of an origin, which was moved or copied there."""
    from lemur_jax.convert.source import open_again  # `lemur report` needs no Orbax

    if not (path and origin):
        return False
    with alone(), contextlib.suppress(UserError):  # there is none, or another one
        return bool(open_again(path, origin))
    return False


def check_changes(changes: Changes, values: Mapping[str, Any], step: int) -> None:
    """Refuses changes, of `config_changes`, that would have affected updates before `step`, that of the newest
    checkpoint.

    A source may be added with share 0, and all shares multiplied by one factor, as with more epochs; a stage may be
    added, removed or changed from `step` on.
    """
    if (steps := values["train"]["steps"]) < step:
        raise UserError(f"config.train.steps is {steps}, but {step} updates are made: give at least as many")
    same_shares = _are_proportional(changes, values)
    for key, (old, new) in changes.items() if step else ():
        if key.startswith("data.sources.") and not key.endswith(".max_epochs"):
            added = old is None and (not key.endswith(".share") or new == 0)
            scaled = same_shares and None not in (old, new) and key.endswith((".share", ".epochs"))
            if not (added or scaled):
                raise UserError(
                    f"--extend cannot change {key} from {old!r} to {new!r}, because {step} updates are made: give"
                    " new shares in config.data.stages, and new sources the share 0"
                )
        if key.startswith("data.stages."):
            name = key.removeprefix("data.stages.").rpartition(".shares.")[0] or key.split(".")[2]
            starts = [value for value in changes.get(f"data.stages.{name}.step", ()) if value is not None]
            starts = starts or [values["data"]["stages"][name]["step"]]
            if min(starts) < step:
                raise UserError(f"--extend cannot change {key}: the stage begins before step {step}")


def _are_proportional(changes: Changes, values: Mapping[str, Any]) -> bool:
    """Whether the earlier sources still have the same proportions of the tokens."""
    sources = values["data"]["sources"].items()
    shares = [
        changes.get(f"data.sources.{name}.share", (each["share"], each["share"])) for name, each in sources
    ]
    factors = [new / old for old, new in shares if old]
    # Shares of `epochs` are rounded products.
    return bool(factors) and math.isclose(min(factors), max(factors), rel_tol=1e-12)


def claim(values: Mapping[str, Any], workdir: epath.Path) -> None:
    """Writes the config that the workdir belongs to from now on; the primary host calls it."""
    workdir.mkdir(parents=True, exist_ok=True)
    write_json(workdir / "config.json", values)
