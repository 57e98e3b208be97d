"""Reads runs back from their workdirs."""

import dataclasses
import os
from collections.abc import Iterable, Sequence
from typing import Any

from etils import epath

from lemur_jax.common.errors import UserError
from lemur_jax.common.paths import absolute
from lemur_jax.config import flatten
from lemur_jax.telemetry.metrics import METRICS_FILE, Record, scan_metrics
from lemur_jax.train.workdir import read_config


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """One run of `lemur train`: a stage of a recipe, or one of several that are compared.

    Records are sorted by step, each step once.
    """

    name: str  # the end of the workdir's path that tells it from the others
    workdir: str  # its absolute path
    config: dict[str, Any]  # `config.json`, flat: "train.steps"; empty if there is none
    train: list[Record]
    evals: dict[str, list[Record]]  # task -> its held-out evaluations
    balance: list[Record]
    starts: list[Record]  # of the processes that made the run
    time: Record  # the last record of where the wall time went; empty if there is none
    skipped_lines: int  # of the metrics file, because they could not be read

    def option(self, key: str) -> float | None:
        """A config value that is a number, else None."""
        value = self.config.get(key)
        return value if isinstance(value, int | float) else None

    @property
    def last_step(self) -> int:
        return max(records[-1]["step"] for records in [self.train, *self.evals.values()] if records)

    @property
    def sources(self) -> list[str]:
        """Data sources whose loss was recorded."""
        keys = {key: None for record in self.train for key in record if key.startswith("loss/")}
        return [key.removeprefix("loss/") for key in keys]

    def last_eval(self, task: str) -> Record | None:
        """The last evaluation of `task` with a finite number of bits per byte."""
        scored = [record for record in self.evals.get(task, ()) if record.get("bits_per_byte") is not None]
        return scored[-1] if scored else None

    @property
    def last_balance(self) -> float | None:
        """The last finite balance score."""
        scores = [record["balance"] for record in self.balance if record.get("balance") is not None]
        return scores[-1] if scores else None


def read_runs(workdirs: Sequence[epath.PathLike]) -> list[Run]:
    """The runs in `workdirs`; UserError if one has no metrics or an unreadable config."""
    paths = [os.fspath(absolute(workdir)) for workdir in workdirs]
    return [_read_run(path, name) for path, name in zip(paths, _short_names(paths), strict=True)]


def all_tasks(runs: Iterable[Run]) -> list[str]:
    """Held-out tasks of the runs, in the order of their first appearance."""
    return list(dict.fromkeys(task for run in runs for task in run.evals))


def _read_run(path: str, name: str) -> Run:
    records, skipped = scan_metrics(path)
    tasks = dict.fromkeys(one["task"] for one in records if one.get("kind") == "eval" and "task" in one)
    evals = {task: _by_step(records, "eval", task) for task in tasks}
    train = _by_step(records, "train")
    if not train and not evals:
        unreadable = f" that can be read ({skipped} lines cannot)" if skipped else " yet"
        raise UserError(f"{METRICS_FILE} in {path} holds no record{unreadable}: wait for the first step")
    return Run(
        name=name,
        workdir=path,
        config=flatten(read_config(epath.Path(path))),
        train=train,
        evals=evals,
        balance=_by_step(records, "balance"),
        starts=[record for record in records if record.get("kind") == "start"],
        time=next((record for record in reversed(records) if record.get("kind") == "time"), {}),
        skipped_lines=skipped,
    )


def _by_step(records: Iterable[Record], kind: str, task: str | None = None) -> list[Record]:
    """Records of a kind, and of a task; of two of one step the later counts."""
    found = {
        one["step"]: one for one in records if one.get("kind") == kind and task in (None, one.get("task"))
    }
    return [found[step] for step in sorted(found)]


def _short_names(paths: list[str]) -> list[str]:
    """The shortest ends of the paths, in whole components, that differ from each other."""
    parts = [path.split("/") for path in paths]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{path} ({number})" for number, path in enumerate(paths, start=1)]
