"""The figures of a sweep: of every run, their means and spread over seeds, the Pareto front, a table."""

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from lemur_jax.common.errors import UserError
from lemur_jax.config import RunConfig
from lemur_jax.sweep.law import (
    Laws,
    best_rows,
    check_same_start,
    fit_laws,
    law_note,
    law_rows,
    read_bits,
    read_points,
)
from lemur_jax.sweep.merging import Merge
from lemur_jax.sweep.runs import SweepRun
from lemur_jax.telemetry.metrics import read_metrics


@dataclasses.dataclass(frozen=True, kw_only=True)
class Variant:
    """Runs, or merged models, that differ only in their seed."""

    name: str  # e.g. "10:1"
    merged: bool  # the models were merged and not trained
    seeds: tuple[int, ...]
    bits: dict[str, tuple[float, ...]]  # group -> at the end of each run, the tasks' geometric mean
    balance: tuple[float, ...]  # the score at the end of each run

    def mean(self, group: str) -> float:
        return statistics.fmean(self.bits[group])

    def spread(self, group: str) -> float:
        """Standard deviation over seeds; 0 with a single one."""
        return spread(self.bits[group])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Results:
    """A sweep's figures."""

    base: dict[str, float]  # group -> bits per byte before any training
    variants: tuple[Variant, ...]  # in the order of the sweep
    steps: int | None  # of each run; None: runs differ
    tokens: int | None  # of each run: rows × length × updates
    laws: Laws | None = None  # None: too few ratios, stages, or other keys are varied

    @property
    def groups(self) -> list[str]:
        return list(self.base)

    def front(self, groups: Sequence[str]) -> list[Variant]:
        """The Pareto front: variants that no other dominates in the means of the groups; lower is better."""
        means = np.array([[variant.mean(group) for group in groups] for variant in self.variants])
        dominated = [np.any(np.all(means <= own, 1) & np.any(means < own, 1)) for own in means]
        return [variant for variant, lost in zip(self.variants, dominated, strict=True) if not lost]

    def least_difference(self, group: str) -> float | None:
        """The smallest significant difference between two means at 95%, in bits per byte; None with one seed.

        Fisher's least significant difference, t · s · √(2 / n), of a randomized block design. A seed is a block: it
        determines which documents every mixture sees, so its common effect is no noise between them. There is no
        correction for the number of comparisons.
        """
        from scipy import stats

        bits = np.array([variant.bits[group] for variant in self.variants if not variant.merged])
        freedom = (bits.shape[0] - 1) * (bits.shape[1] - 1)
        if not freedom:
            return None
        residual = bits - bits.mean(1, keepdims=True) - bits.mean(0, keepdims=True) + bits.mean()
        variance = np.sum(residual**2) / freedom
        return float(stats.t.ppf(0.975, freedom) * np.sqrt(2 * variance / bits.shape[1]))


def spread(values: Sequence[float]) -> float:
    """Sample standard deviation; 0 for a single value."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def read_results(
    runs: Mapping[SweepRun, RunConfig], merges: Sequence[Merge], workdir: epath.PathLike
) -> Results:
    """The figures of finished runs and merges; UserError if one has no score of its start or end, or another start."""
    first_run, config = next(iter(runs.items()))
    reference: dict[Any, epath.Path] = {}
    for run in runs:
        run_directory = run.directory(workdir)
        other = reference.setdefault(run.settings, run_directory)
        check_same_start(read_metrics(run_directory), read_metrics(other), run_directory, other)
    groups = config.eval.task_groups
    base = read_bits(first_run.directory(workdir), groups, 0)
    variants: dict[str, list[tuple[SweepRun | Merge, dict[str, float], float]]] = {}
    items: list[SweepRun | Merge] = [*runs, *merges]
    for item in items:
        directory = item.directory(workdir)
        scored = read_bits(directory, groups, None), _balance(directory)
        variants.setdefault(item.variant, []).append((item, *scored))
    summaries = tuple(
        Variant(
            name=name,
            merged=isinstance(members[0][0], Merge),
            seeds=tuple(item.seed for item, _, _ in members),
            bits={group: tuple(bits[group] for _, bits, _ in members) for group in groups},
            balance=tuple(score for _, _, score in members),
        )
        for name, members in variants.items()
    )
    steps = {one.train.steps for one in runs.values()}
    tokens = {one.train.steps * one.train.batch_rows * one.data.sequence_length for one in runs.values()}
    laws = None
    # Another key changes more than the law knows, and so do the shares of a stage.
    if not config.data.stages and all(key == "train.steps" for run in runs for key, _ in run.settings):
        points = read_points(runs, workdir, groups)
        # Groups are not ordered; that of the first task is the group of the first part of a ratio.
        named = [name for name in groups if config.eval.tasks[0] in groups[name]] or list(groups)
        laws = fit_laws(base, points, named[0])
    return Results(
        base=base,
        variants=summaries,
        steps=steps.pop() if len(steps) == 1 else None,
        tokens=tokens.pop() if len(tokens) == 1 else None,
        laws=laws,
    )


def _balance(directory: epath.Path) -> float:
    scores = [record["balance"] for record in read_metrics(directory) if record.get("kind") == "balance"]
    if not scores:
        raise UserError(f"{directory} has no balance score: it was not scored at step 0")
    return scores[-1]


def to_json(results: Results) -> dict[str, Any]:
    """All figures as JSON values."""
    return {
        **dataclasses.asdict(results),
        "least_difference": {group: results.least_difference(group) for group in results.groups},
        "pareto": [variant.name for variant in results.front(results.groups)],
    }


def table_rows(results: Results) -> list[list[str]]:
    """The table: a head, the base, and a row for each variant."""
    groups = results.groups
    bits, changes = ([f"{group}, {what}" for group in groups] for what in ("bits/byte", "change"))
    base = [f"{results.base[group]:.4f}" for group in groups]
    rows = [
        ["mixture", "seeds", *bits, *changes, "balance", "Pareto"],
        ["base", "", *base, *[""] * (len(groups) + 2)],
    ]
    front = results.front(groups)
    for variant in results.variants:
        means = [f"{variant.mean(group):.4f} ± {variant.spread(group):.4f}" for group in groups]
        changes = [f"{variant.mean(group) / results.base[group] - 1:+.1%}" for group in groups]
        score = f"{statistics.fmean(variant.balance):+.2%} ± {spread(variant.balance):.2%}"
        on_front = "yes" if variant in front else ""
        rows.append([variant.name, str(len(variant.seeds)), *means, *changes, score, on_front])
    return rows


def summary(results: Results) -> str:
    """A sentence on the size of the runs, where all have the same, and one on the smallest significant differences."""
    parts = ["Mean ± standard deviation over seeds; lower bits are better, a higher balance is better."]
    if results.steps and results.tokens:
        parts[0] = f"{results.steps:,} updates and {results.tokens:,} tokens each; m{parts[0][1:]}"
    least = {group: results.least_difference(group) for group in results.groups}
    if all(value is not None for value in least.values()):
        shown = ", ".join(f"{group} {value:.4f}" for group, value in least.items())
        parts.append(f"Means nearer than this are not told apart by the seeds (95%, bits/byte): {shown}.")
    return " ".join(parts)


def markdown_table(results: Results) -> str:
    """The tables and their notes in Markdown."""
    text = f"{_markdown(table_rows(results))}\n\n{summary(results)}\n"
    if laws := results.laws:
        text += f"\n{_markdown(law_rows(laws))}\n\n{_markdown(best_rows(laws))}\n\n{law_note(laws)}\n"
    return text


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    head, *body = rows
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *body])
