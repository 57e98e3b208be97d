"""Which runs a sweep has: every ratio, every setting, every seed; each is a `lemur train` of its own."""

import dataclasses
import itertools
import math
import shlex
from collections.abc import Iterable, Mapping, Sequence

from etils import epath

from lemur_jax.common.errors import UserError
from lemur_jax.config import RunConfig, load

MAX_RUNS = 1000
# Keys that change the held-out figures of the base, with which those of all runs are compared.
_OF_THE_BASE = (
    "adapter.checkpoint",
    "data.sequence_length",
    "data.stores",
    "eval.",
    "init.",
    "model.",
    "tokenizer.",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SweepRun:
    """One run."""

    ratio: str  # shares of the parts of `source_parts`, as typed: "10:1"
    settings: tuple[tuple[str, str], ...]  # other keys that are varied, with their values as typed
    seed: int
    overrides: tuple[str, ...]  # all of it as `--config.key=value`

    @property
    def variant(self) -> str:
        """What runs that differ in their seed alone have in common."""
        short = [key.rpartition(".")[2] for key, _ in self.settings]
        keys = short if len(set(short)) == len(short) else [key for key, _ in self.settings]
        return ", ".join(
            [self.ratio, *(f"{key} {value}" for key, (_, value) in zip(keys, self.settings, strict=True))]
        )

    @property
    def name(self) -> str:
        """The name of its workdir."""
        words = [self.ratio.replace(":", "-"), *(f"{key}-{value}" for key, value in self.settings)]
        return "_".join([*words, f"seed-{self.seed}"]).replace("/", "-")

    def directory(self, workdir: epath.PathLike) -> epath.Path:
        """The run's workdir, in that of the sweep."""
        return epath.Path(workdir) / "runs" / self.name


def parse_ratio(ratio: str) -> list[float]:
    """The shares in "10:1"; UserError if they are not that, or all 0."""
    try:
        shares = [float(share) for share in ratio.split(":")]
    except ValueError:
        shares = []
    if not shares or not all(0 <= share < math.inf for share in shares) or not any(shares):
        raise UserError(
            f"cannot read the ratio {ratio!r}: write shares of 0 or more like 10:1, not all of them 0"
        )
    return shares


def shares_of(ratio: str) -> tuple[float, ...]:
    """The shares in a ratio such as "10:1", scaled to add up to 1."""
    shares = parse_ratio(ratio)
    return tuple(share / sum(shares) for share in shares)


def source_parts(have: Iterable[str], tasks: Sequence[str], sources: str = "") -> list[tuple[str, ...]]:
    """The sources that each part of a ratio is divided among.

    `sources` is like "code,text", or "code/Python&code/C++,web" where a part is several; empty: the order of the
    held-out `tasks` (sources are sorted by name). Raises UserError if a source is unknown or left out.
    """
    order = sources or ",".join(tasks)
    parts = [tuple(part.split("&")) for part in order.split(",")]
    names = [name for part in parts for name in part]
    if sorted(names) != sorted(have):
        option = f"--sources {sources!r}" if sources else "the ratios have no order: --sources"
        raise UserError(
            f"{option} must name each of {', '.join(sorted(have))} once, e.g. code,text or python&java,text"
        )
    return parts


def plan_runs(
    config: RunConfig,
    ratios: Sequence[str],
    seeds: int,
    varied: Sequence[tuple[str, Sequence[str]]] = (),
    sources: str = "",
) -> list[SweepRun]:
    """All runs, those of one variant together, seeds counted from that of `config`.

    Args:
      ratios: like "10:1"; none: the config's own shares.
      varied: every other key that is varied, with its values.
      sources: what the parts of a ratio are, see `source_parts`.

    Raises UserError for a ratio that does not fit the sources, no seeds, a key of the base, too many runs, or the same
    run twice.
    """
    if config.data.mixture:
        raise UserError(
            f"config.data.mixture is {config.data.mixture!r}: a sweep varies shares, so name data.sources in its place"
        )
    if config.data.by_epochs:
        raise UserError(
            "the sources of config.data have `epochs`: a sweep varies shares, so give shares in their place"
        )
    parts = source_parts(config.data.sources, config.eval.tasks, sources)
    shares = {name: source.share for name, source in config.data.sources.items()}
    ratios = list(ratios) or [":".join(f"{sum(shares[name] for name in part):g}" for part in parts)]
    if seeds < 1:
        raise UserError(f"--seeds is {seeds}: it must be at least 1")
    count = len(ratios) * math.prod(len(values) for _, values in varied) * seeds
    if count > MAX_RUNS:
        raise UserError(
            f"the sweep has {count:,} runs, above {MAX_RUNS:,}: give fewer --ratios, values of --vary, or --seeds"
        )
    for ratio in ratios:
        if len(parse_ratio(ratio)) != len(parts):
            parts_text = ", ".join("&".join(part) for part in parts)
            raise UserError(
                f"the ratio {ratio!r} has {len(parse_ratio(ratio))} parts, the sources have {len(parts)}: {parts_text}"
            )
    _check_varied([key for key, _ in varied])
    axes = [[(key, value) for value in values] for key, values in varied]
    runs = []
    for ratio, settings in itertools.product(ratios, itertools.product(*axes)):
        overrides = [
            f"--config.data.sources{_key(name)}.share={share:.12g}"
            for part, total in zip(parts, parse_ratio(ratio), strict=True)
            for name, share in _divided(total, part, shares).items()
        ]
        overrides += [f"--config.{key}={value}" for key, value in settings]
        for seed in range(config.seed, config.seed + seeds):
            all_overrides = (*overrides, f"--config.seed={seed}")
            runs.append(SweepRun(ratio=ratio, settings=settings, seed=seed, overrides=all_overrides))
    if len({run.name for run in runs}) < len(runs) or len(set(map(shares_of, ratios))) < len(ratios):
        raise UserError("the sweep has a run twice: name every ratio (2:2 is 1:1) and every value once")
    return runs


def _key(name: str) -> str:
    """A source's name as an override has it: languages of a corpus ("code/C++") are quoted."""
    return f".{name}" if name.isidentifier() else f"[{name!r}]"


def _divided(total: float, part: Sequence[str], shares: Mapping[str, float]) -> dict[str, float]:
    """Divides `total` among the sources of a part as the config does, or evenly if it gives them no share."""
    weight = sum(shares[name] for name in part)
    return {name: total * shares[name] / weight if weight else total / len(part) for name in part}


def _check_varied(keys: Sequence[str]) -> None:
    for key in keys:
        why = ""
        if keys.count(key) > 1:
            why = "name all its values in one --vary"
        elif key == "seed" or key.startswith("data.sources"):
            why = "--seeds and --ratios are for that"
        elif key.startswith(_OF_THE_BASE):
            why = "all runs are compared with one base; make a sweep for each value"
        if why:
            raise UserError(f"cannot vary config.{key}: {why}")


def run_configs(
    argument: str, overrides: Sequence[str], runs: Sequence[SweepRun]
) -> dict[SweepRun, RunConfig]:
    """The config of each run; UserError where two have the same, as of --vary KEY=1e-3,0.001."""
    configs = {run: load(argument, [*overrides, *run.overrides]).with_counts() for run in runs}
    first: dict[str, SweepRun] = {}
    for run, config in configs.items():
        if (same := first.setdefault(config.fingerprint(), run)) != run:
            raise UserError(f"{same.variant} and {run.variant} are the same run: name every value once")
    return configs


def command(argument: str, overrides: Sequence[str], run: SweepRun, workdir: epath.PathLike) -> str:
    """The run as a line for a shell, or for a launcher."""
    words = ["lemur", "train", "--config", argument, "--workdir", str(run.directory(workdir))]
    return shlex.join([*words, *overrides, *run.overrides])
