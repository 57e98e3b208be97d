"""What a sweep has found: figures of every run, means and spread over seeds, a table, the Pareto front."""

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from lemur_jax.common.errors import UserError
from lemur_jax.sweep.merging import Merge, merge_directory
from lemur_jax.sweep.runs import SweepRun, run_directory
from lemur_jax.telemetry.metrics import read_metrics
from lemur_jax.train.balance import check_groups


@dataclasses.dataclass(frozen=True, kw_only=True)
class Variant:
    """Runs, or merged models, that differ in their seed alone.

    Attributes:
      name: e.g. "10:1".
      merged: whether nothing was trained for it.
      seeds: of its runs.
      bits: group -> bits per byte at the end of each run, a geometric mean over the group's tasks.
      balance: the score at the end of each run.
    """

    name: str
    merged: bool
    seeds: tuple[int, ...]
    bits: dict[str, tuple[float, ...]]
    balance: tuple[float, ...]

    def mean(self, group: str) -> float:
        return statistics.fmean(self.bits[group])

    def spread(self, group: str) -> float:
        """Standard deviation over seeds; 0 with a single one."""
        return spread(self.bits[group])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Results:
    """A sweep's figures.

    Attributes:
      base: group -> bits per byte before any training.
      variants: in the order of the sweep.
      steps, tokens: of each run; tokens are positions, rows × length × updates.
    """

    base: dict[str, float]
    variants: tuple[Variant, ...]
    steps: int
    tokens: int

    @property
    def groups(self) -> list[str]:
        return list(self.base)

    def front(self, groups: Sequence[str]) -> list[Variant]:
        """Variants that no other equals or betters in the mean of every group and betters in one."""

        def beaten(one: Variant) -> bool:
            mine = [one.mean(group) for group in groups]
            theirs = [[other.mean(group) for group in groups] for other in self.variants]
            return any(
                their != mine and all(t <= m for t, m in zip(their, mine, strict=True)) for their in theirs
            )

        return [variant for variant in self.variants if not beaten(variant)]

    def least_difference(self, group: str) -> float | None:
        """How far two means must lie apart to be told from chance at 95%; None where that cannot be said.

        Fisher's least significant difference, t · s · √(2 / n), of a randomized block design: a seed is a
        block, for it fixes which documents every mixture sees, so what it does to all of them alike is
        no noise between them. It does not correct for the number of comparisons.
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
    """Sample standard deviation; 0 of a single value."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def collect(
    config: ConfigDict, runs: Sequence[SweepRun], merges: Sequence[Merge], workdir: epath.PathLike
) -> Results:
    """Reads the figures of finished runs and merges back.

    Raises:
      UserError: a run has not been scored at its end.
    """
    groups = check_groups(config.eval.groups, config.eval.tasks)
    base = _bits(run_directory(workdir, runs[0]), groups, 0)
    found: dict[str, list[tuple[SweepRun | Merge, dict[str, float], float]]] = {}
    items: list[SweepRun | Merge] = [*runs, *merges]
    for item in items:
        directory = (
            merge_directory(workdir, item) if isinstance(item, Merge) else run_directory(workdir, item)
        )
        scored = _bits(directory, groups, None), _balance(directory)
        found.setdefault(item.variant, []).append((item, *scored))
    variants = tuple(
        Variant(
            name=name,
            merged=isinstance(of[0][0], Merge),
            seeds=tuple(item.seed for item, _, _ in of),
            bits={group: tuple(bits[group] for _, bits, _ in of) for group in groups},
            balance=tuple(score for _, _, score in of),
        )
        for name, of in found.items()
    )
    tokens = config.train.steps * config.train.batch_rows * config.data.sequence_length
    return Results(base=base, variants=variants, steps=config.train.steps, tokens=tokens)


def _bits(directory: epath.Path, groups: Mapping[str, Sequence[str]], step: int | None) -> dict[str, float]:
    """Bits per byte by group, at a step or at the last evaluation."""
    tasks = {
        record["task"]: record["bits_per_byte"]
        for record in read_metrics(directory)
        if record.get("kind") == "eval" and step in (None, record["step"])
    }
    if missing := [task for of in groups.values() for task in of if not tasks.get(task)]:
        raise UserError(
            f"{directory} has no held-out figure of {missing[0]}{'' if step is None else f' at step {step}'}"
        )
    return {
        name: math.exp(statistics.fmean(math.log(tasks[task]) for task in of)) for name, of in groups.items()
    }


def _balance(directory: epath.Path) -> float:
    scores = [record["balance"] for record in read_metrics(directory) if record.get("kind") == "balance"]
    if not scores:
        raise UserError(f"{directory} has no balance score: it was not scored at step 0")
    return scores[-1]


def to_json(results: Results) -> dict[str, Any]:
    """Everything, as JSON takes it."""
    return {
        **dataclasses.asdict(results),
        "least_difference": {group: results.least_difference(group) for group in results.groups},
        "pareto": [variant.name for variant in results.front(results.groups)],
    }


def rows(results: Results) -> list[list[str]]:
    """The table: a head, the base, and a row for each variant."""
    groups = results.groups
    head = [
        "mixture",
        "seeds",
        *(f"{group}, bits/byte" for group in groups),
        *(f"{group}, change" for group in groups),
    ]
    found = [[*head, "balance", "Pareto"]]
    found.append(["base", "", *(f"{results.base[group]:.4f}" for group in groups), *[""] * (len(groups) + 2)])
    front = results.front(groups)
    for variant in results.variants:
        means = [f"{variant.mean(group):.4f} ± {variant.spread(group):.4f}" for group in groups]
        changes = [f"{variant.mean(group) / results.base[group] - 1:+.1%}" for group in groups]
        score = f"{statistics.fmean(variant.balance):+.2%} ± {spread(variant.balance):.2%}"
        found.append(
            [
                variant.name,
                str(len(variant.seeds)),
                *means,
                *changes,
                score,
                "yes" if variant in front else "",
            ]
        )
    return found


def note(results: Results) -> str:
    """What the table does not say by itself."""
    parts = [
        f"{results.steps:,} updates and {results.tokens:,} tokens each; mean ± standard deviation over seeds;"
        " lower bits are better, a higher balance is better."
    ]
    least = {group: results.least_difference(group) for group in results.groups}
    if all(value is not None for value in least.values()):
        shown = ", ".join(f"{group} {value:.4f}" for group, value in least.items())
        parts.append(f"Means nearer than this are not told apart by the seeds (95%, bits/byte): {shown}.")
    return " ".join(parts)


def markdown(results: Results) -> str:
    """The table and its note."""
    head, *body = rows(results)
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + f"\n\n{note(results)}\n"
