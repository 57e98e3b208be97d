"""A law of held-out loss over shares and tokens, fitted to the runs of a sweep; it predicts the best ratio.

For each group of held-out tasks, with L0 the bits per byte of the base, n the tokens of a run and s the share of that
part of the data on which the group depends:

    log(L / L0) = drift · log(1 + n / scale) - gain · log(1 + s n / scale)

`drift` is what any further training does to the group, of whatever data (above 0: forgetting; below: transfer), and
`gain` what its own data gives. Both grow with the logarithm of tokens, that is L is a power law in them, and both are
0 at n = 0. For each `scale` of a grid the other two follow by linear least squares. Published laws of mixtures have
other forms: exponential in the shares at a fixed n (Ye et al. 2024, "Data Mixing Laws"), and a power of the share over
a power of n (Que et al. 2024, "D-CPT Law"). This one has three parameters: five ratios leave some to test it with.
"""

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence

import numpy as np
from etils import epath

from lemur_jax.common.errors import UserError
from lemur_jax.config import RunConfig
from lemur_jax.sweep.runs import SweepRun, shares_of
from lemur_jax.telemetry.metrics import Record, read_metrics

PARAMETERS = 3
WEIGHTS = (0.3, 0.5, 0.7, 0.8, 0.9)  # of one group, for which tables name the best ratio
_SCALES = np.geomspace(1e-4, 1e2, 301)  # in tokens of the longest run
_GRID = np.linspace(0, 1, 1001)  # shares of the first part
_SAME = 1e-3  # relative difference of bits per byte that rounding on other devices may make


@dataclasses.dataclass(frozen=True, kw_only=True)
class Point:
    """The evaluation of a ratio after some tokens, the mean over its seeds."""

    ratio: str
    shares: tuple[float, ...]  # of the parts of the ratio; their sum is 1
    tokens: int
    bits: Mapping[str, float]  # group -> bits per byte


@dataclasses.dataclass(frozen=True, kw_only=True)
class Law:
    """The law of one group; symbols as above."""

    base: float  # L0, bits per byte
    part: int  # the part of the ratio whose share is s
    scale: float  # tokens
    drift: float
    gain: float
    error: float = 0.0  # root mean square of log L over the points that it was fitted to

    def log_ratio(self, share: np.ndarray | float, tokens: np.ndarray | float) -> np.ndarray:
        """log(L / L0) at a share of `part` and tokens of a run."""
        own = np.log1p(np.asarray(share) * tokens / self.scale)
        return self.drift * np.log1p(np.asarray(tokens) / self.scale) - self.gain * own

    def bits(self, shares: Sequence[float], tokens: float) -> float:
        """Predicted bits per byte."""
        return float(self.base * np.exp(self.log_ratio(shares[self.part], tokens)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Laws:
    """The laws of a sweep of two parts, and how well they predict a ratio that was left out."""

    laws: Mapping[str, Law]  # by group
    first: str  # the group whose weight the tables vary
    points: Sequence[Point]  # that they were fitted to
    # ratio -> group -> log of predicted over measured bits per byte after the longest run, by laws fitted to the
    # other ratios alone; of the ratios that have both parts
    held_out: Mapping[str, Mapping[str, float]]

    @property
    def tokens(self) -> int:
        return max(point.tokens for point in self.points)

    def best_share(self, weight: float) -> float:
        """The share of the first part with the lowest weighted mean of log(L / L0) after the longest run.

        `weight` is that of the group `first`; the others share the rest alike.
        """
        shares = np.stack([_GRID, 1 - _GRID])
        weights = self._weights(weight)
        total = sum(
            weights[group] * law.log_ratio(shares[law.part], self.tokens) for group, law in self.laws.items()
        )
        return float(_GRID[np.argmin(total)])

    def best_measured(self, weight: float) -> str:
        """The ratio that is best by the same measure, of those that were trained."""
        weights = self._weights(weight)

        def score(point: Point) -> float:
            parts = point.bits.items()
            return sum(weights[group] * math.log(bits / self.laws[group].base) for group, bits in parts)

        return min((point for point in self.points if point.tokens == self.tokens), key=score).ratio

    def _weights(self, weight: float) -> dict[str, float]:
        rest = (1 - weight) / max(1, len(self.laws) - 1)
        return {group: weight if group == self.first else rest for group in self.laws}


def read_bits(
    directory: epath.Path, groups: Mapping[str, Sequence[str]], step: int | None
) -> dict[str, float]:
    """Bits per byte by group, at a step or at the last evaluation."""
    tasks = {
        record["task"]: record.get("bits_per_byte")
        for record in read_metrics(directory)
        if record.get("kind") == "eval" and step in (None, record["step"])
    }
    if missing := [task for group in groups.values() for task in group if not tasks.get(task)]:
        where = "" if step is None else f" at step {step}"
        raise UserError(
            f"{directory} has no held-out figure of {missing[0]}{where}: delete it to train it again"
        )
    return {name: statistics.geometric_mean(tasks[task] for task in group) for name, group in groups.items()}


def check_same_start(
    records: Sequence[Record], others: Sequence[Record], place: epath.PathLike, other: epath.PathLike
) -> None:
    """UserError: two runs differ in their held-out figures before the first step, beyond rounding.

    Their base (a run that has continued since), the text that is scored or its precision was not the same.
    """
    starts = {record["task"]: record for record in others if _is_start(record)}
    for record in filter(_is_start, records):
        text, bits = (record.get(key) for key in ("bytes", "bits_per_byte"))
        start = starts.get(record["task"], record)
        if text != start.get("bytes") or not math.isclose(bits, start["bits_per_byte"], rel_tol=_SAME):
            raise UserError(
                f"{place} has {bits:.4f} bits per byte of {record['task']} before training ({text} bytes), {other}"
                f" {start['bits_per_byte']:.4f} ({start.get('bytes')} bytes): config.init.checkpoint, the text or"
                " config.compute has changed between them; put back what was there, or sweep in a new --workdir"
            )


def _is_start(record: Record) -> bool:
    return record.get("kind") == "eval" and record["step"] == 0 and record.get("bits_per_byte") is not None


def read_points(
    runs: Mapping[SweepRun, RunConfig], workdir: epath.PathLike, groups: Mapping[str, Sequence[str]]
) -> list[Point]:
    """The points of a sweep; `groups` are held-out tasks by group.

    With a constant learning rate after warmup, an intermediate evaluation is that of a shorter run and counts too;
    otherwise only the last one of each run.
    """
    by_point: dict[tuple[str, int], list[dict[str, float]]] = {}
    for run, config in runs.items():
        directory, optimizer = run.directory(workdir), config.optimizer
        steps = {record["step"] for record in read_metrics(directory) if record.get("kind") == "eval"}
        constant = optimizer.final_learning_rate == optimizer.learning_rate
        used = {step for step in steps if step > optimizer.warmup_steps} if constant else {max(steps)}
        for step in used:
            tokens = step * config.train.batch_rows * config.data.sequence_length
            by_point.setdefault((run.ratio, tokens), []).append(read_bits(directory, groups, step))
    return [
        Point(
            ratio=ratio,
            shares=shares_of(ratio),
            tokens=tokens,
            bits={group: statistics.fmean(one[group] for one in seeds) for group in seeds[0]},
        )
        for (ratio, tokens), seeds in sorted(by_point.items(), key=lambda item: item[0][1])
    ]


def fit_laws(base: Mapping[str, float], points: Sequence[Point], first: str) -> Laws | None:
    """The laws of every group, `base` being its bits per byte before training; the tables vary the weight of `first`.

    None where the ratios do not have two parts, or are fewer than the parameters and one.
    """
    ratios = {point.ratio: point.shares for point in points}
    if len(ratios) <= PARAMETERS or any(len(shares) != 2 for shares in ratios.values()):
        return None
    laws = {
        group: min((_fit(base[group], points, group, part) for part in range(2)), key=lambda law: law.error)
        for group in base
    }
    held_out = {}
    for ratio in (ratio for ratio, shares in ratios.items() if all(shares)):
        others = [point for point in points if point.ratio != ratio]
        last = max((point for point in points if point.ratio == ratio), key=lambda point: point.tokens)
        fitted = {group: _fit(base[group], others, group, law.part) for group, law in laws.items()}
        held_out[ratio] = {
            group: math.log(law.bits(last.shares, last.tokens) / last.bits[group])
            for group, law in fitted.items()
        }
    return Laws(laws=laws, first=first, points=points, held_out=held_out)


def _fit(base: float, points: Sequence[Point], group: str, part: int) -> Law:
    """The law of one group by least squares, its share that of `part`."""
    tokens = np.array([point.tokens for point in points], float)
    share = np.array([point.shares[part] for point in points])
    target = np.log([point.bits[group] / base for point in points])
    laws = []
    for scale in _SCALES * tokens.max():
        features = np.stack([np.log1p(tokens / scale), -np.log1p(share * tokens / scale)], axis=1)
        (drift, gain), *_ = np.linalg.lstsq(features, target, rcond=None)
        error = float(np.sqrt(np.mean((features @ (drift, gain) - target) ** 2)))
        law = Law(base=base, part=part, scale=float(scale), drift=float(drift), gain=float(gain), error=error)
        laws.append(law)
    return min(laws, key=lambda law: law.error)


def law_rows(laws: Laws) -> list[list[str]]:
    """A table: a head, and a row for each group."""
    ratios = list(laws.held_out)
    rows = [["group", "drift", "gain", "scale, tokens", "fit", *(f"without {ratio}" for ratio in ratios)]]
    for group, law in laws.laws.items():
        errors = [f"{np.expm1(laws.held_out[ratio][group]):+.2%}" for ratio in ratios]
        cells = [f"{law.drift:+.4f}", f"{law.gain:+.4f}", f"{law.scale:,.0f}", f"{np.expm1(law.error):.2%}"]
        rows.append([group, *cells, *errors])
    return rows


def best_rows(laws: Laws, weights: Sequence[float] = WEIGHTS) -> list[list[str]]:
    """A table: a head, and the best share of the first part for each weight of `laws.first`."""
    rows = [[f"weight of {laws.first}", "best share, predicted", "as a ratio", "best of the trained"]]
    for weight in weights:
        share = laws.best_share(weight)
        ratio = f"{float(f'{share / (1 - share):.2g}'):g}:1" if share < 1 else "1:0"
        rows.append([f"{weight:g}", f"{share:.1%}", ratio, laws.best_measured(weight)])
    return rows


def law_note(laws: Laws) -> str:
    """What the columns of both tables are."""
    return (
        f"Law, fitted to {len(laws.points)} evaluations: log(L / base) = drift · log(1 + n / scale)"
        " - gain · log(1 + s n / scale), with n tokens of a run and s the share of the group's own data."
        " Fit: root mean square error of L. Without a ratio: error of its bits per byte after the longest run,"
        " predicted from the other ratios. The other groups share the rest of the weight alike."
    )
