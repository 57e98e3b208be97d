"""Held-out bits per byte of each run, and its change against the runs before it."""

import dataclasses
from collections.abc import Sequence

from etils import epath

from lemur_jax.common.errors import UserError
from lemur_jax.report.runs import Run, all_tasks, read_runs


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
    """One task after one run; None where there is nothing to show or to compare with."""

    value: float | None  # bits per byte in the last evaluation
    first: float | None  # relative change against the first run, -0.1 for 10% lower
    previous: float | None  # against the run before


def with_start(runs: Sequence[Run]) -> list[Run]:
    """The runs, and as a stage before them the model that the first one started from, if it was scored."""
    scored = {task: records[:1] for task, records in runs[0].evals.items() if records[0]["step"] == 0}
    start = dataclasses.replace(runs[0], name="start", evals=scored, balance=[])
    return [start, *runs] if scored else list(runs)


def bits_per_byte_cells(runs: Sequence[Run]) -> dict[str, list[Cell]]:
    """Task -> a cell for each run."""
    cells = {}
    for task in all_tasks(runs):
        records = [run.last_eval(task) for run in runs]
        values = [record["bits_per_byte"] if record else None for record in records]
        earlier = [(None, None), *((values[0], value) for value in values[:-1])]
        cells[task] = [
            Cell(value=value, first=_change(value, first), previous=_change(value, previous))
            for value, (first, previous) in zip(values, earlier, strict=True)
        ]
    return cells


def byte_notes(runs: Sequence[Run]) -> list[str]:
    """A sentence for each task that was scored on texts of different sizes."""
    notes = []
    for task in all_tasks(runs):
        records = [(run.name, run.last_eval(task)) for run in runs]
        sizes = {name: record["bytes"] for name, record in records if record and record.get("bytes")}
        if len(set(sizes.values())) > 1:
            scored = ", ".join(f"{name} {size:,}" for name, size in sizes.items())
            notes.append(f"{task}: its changes also compare different texts; bytes scored: {scored}.")
    return notes


def bits_per_byte_table(workdirs: Sequence[epath.PathLike]) -> str:
    """A plain text table: a row for each stage, a group of columns for each held-out task.

    A group holds the bits per byte of the stage's last evaluation and its change against the first and the previous
    stage. The last column is the balance score, if a stage was scored before its first step. Raises UserError if a
    workdir has no metrics, or no run has been evaluated.
    """
    runs = with_start(read_runs(workdirs))
    cells = bits_per_byte_cells(runs)
    if not cells:
        paths = ", ".join(run.workdir for run in runs)
        raise UserError(
            f"no held-out evaluation in {paths}: name tasks in config.eval.tasks and train to the end"
        )
    stages = ["", "stage", *(run.name for run in runs)]
    columns = [[f"{stage:<{max(map(len, stages))}}" for stage in stages]]
    for task, column in cells.items():
        rows = [f"{'bits':>7}{'first':>9}{'prev.':>9}"]
        rows += [
            f"{_number(cell.value):>7}{percent(cell.first):>9}{percent(cell.previous):>9}" for cell in column
        ]
        width = max(len(task), len(rows[0]))
        columns.append([f"{task:^{width}}", *(f"{row:>{width}}" for row in rows)])
    if any(run.last_balance is not None for run in runs):
        columns.append([" " * 7, "balance", *(f"{percent(run.last_balance):>7}" for run in runs)])
    lines = ["   ".join(row).rstrip() for row in zip(*columns, strict=True)]
    title = (
        "Held-out bits per byte after each stage (lower is better); change against first and previous stage"
    )
    return "\n".join([title, "", *lines, *byte_notes(runs)])


def percent(change: float | None) -> str:
    """-0.104 as `-10.4%`; None as `-`."""
    return "-" if change is None else f"{100 * change:+.1f}%"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _change(value: float | None, reference: float | None) -> float | None:
    return None if value is None or not reference else value / reference - 1
