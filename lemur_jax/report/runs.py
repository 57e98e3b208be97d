"""Reads runs back from their workdirs."""

import dataclasses
import json
import os
from collections.abc import Iterable, Sequence
from typing import Any

from etils import epath

from lemur_jax.common.errors import UserError
from lemur_jax.config import flatten
from lemur_jax.telemetry.metrics import METRICS_FILE, Record, read_metrics

CONFIG_FILE = "config.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """One stage of a recipe.

    Attributes:
      name: the end of the workdir's path that tells it from the others.
      workdir: where it lies.
      config: the run config as in `config.json`, nested; empty if there is none.
      train: records of training, by rising step, each step once.
      time: the last record of where the wall time went; empty if there is none.
      evals: task -> records of its held-out evaluations, by rising step, each step once.
      balance: records of the balance since the checkpoint that the run started from, likewise.
    """

    name: str
    workdir: str
    config: dict[str, Any]
    train: list[Record]
    evals: dict[str, list[Record]]
    balance: list[Record]
    time: Record

    @property
    def flat_config(self) -> dict[str, Any]:
        return flatten(self.config)

    @property
    def last_step(self) -> int:
        """Updates made when anything was last recorded."""
        ends = [records[-1]["step"] for records in [self.train, *self.evals.values()] if records]
        return max(ends)

    @property
    def sources(self) -> list[str]:
        """Data sources whose loss was recorded."""
        keys = {key: None for record in self.train for key in record if key.startswith("loss/")}
        return [key.removeprefix("loss/") for key in keys]

    def last_eval(self, task: str) -> Record | None:
        """The last evaluation of `task` that gave a number of bits per byte."""
        scored = [record for record in self.evals.get(task, ()) if record.get("bits_per_byte") is not None]
        return scored[-1] if scored else None

    @property
    def last_balance(self) -> float | None:
        """The last balance score that is a number."""
        scores = [record["balance"] for record in self.balance if record.get("balance") is not None]
        return scores[-1] if scores else None


def load_runs(workdirs: Sequence[epath.PathLike]) -> list[Run]:
    """The runs in `workdirs`, in that order.

    Raises:
      UserError: no workdir is given, or one has no metrics or an unreadable config.
    """
    if not workdirs:
        raise UserError("there is no run to report on: give one workdir of `lemur train` or several")
    paths = [_absolute(os.fspath(workdir)) for workdir in workdirs]
    return [_load(path, name) for path, name in zip(paths, _names(paths), strict=True)]


def all_tasks(runs: Iterable[Run]) -> list[str]:
    """Held-out tasks of the runs, in the order of their first appearance."""
    return list(dict.fromkeys(task for run in runs for task in run.evals))


def _absolute(path: str) -> str:
    return path.rstrip("/") if "://" in path else os.path.abspath(path)


def _load(path: str, name: str) -> Run:
    train: dict[int, Record] = {}
    evals: dict[str, dict[int, Record]] = {}
    balance: dict[int, Record] = {}
    time: Record = {}
    for record in read_metrics(path):
        # Of a step that was recorded twice the later record counts; kinds of other versions are no curves.
        kind, step, task = record.get("kind"), record.get("step"), record.get("task")
        if kind == "train" and isinstance(step, int):
            train[step] = record
        elif kind == "eval" and isinstance(step, int) and isinstance(task, str):
            evals.setdefault(task, {})[step] = record
        elif kind == "balance" and isinstance(step, int):
            balance[step] = record
        elif kind == "time":
            time = record
    if not train and not evals:
        raise UserError(f"{METRICS_FILE} in {path} holds no record yet: wait for the first step of the run")
    return Run(
        name=name,
        workdir=path,
        config=_load_config(path),
        train=_by_step(train),
        evals={task: _by_step(records) for task, records in evals.items()},
        balance=_by_step(balance),
        time=time,
    )


def _load_config(path: str) -> dict[str, Any]:
    file = epath.Path(path) / CONFIG_FILE
    if not file.exists():
        return {}
    try:
        return json.loads(file.read_text())
    except ValueError as error:
        raise UserError(
            f"{file} is not JSON ({error}): restore it, or remove it to report without"
        ) from error


def _by_step(records: dict[int, Record]) -> list[Record]:
    return [records[step] for step in sorted(records)]


def _names(paths: list[str]) -> list[str]:
    """The shortest ends of the paths, in whole components, that differ from each other."""
    parts = [path.split("/") for path in paths]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{path} ({number})" for number, path in enumerate(paths, start=1)]
