"""Models merged with the weights that training began from; nothing is trained again.

With θ0 the start, θ a trained run and λ the weight:
  linear      θ0 + λ (θ - θ0), for each run (Wortsman et al. 2022, "Robust fine-tuning of zero-shot models")
  arithmetic  θ0 + λ Σ (θi - θ0) over the runs of a seed that saw one part of the data alone (Ilharco et al. 2023,
              "Editing models with task arithmetic")
"""

import collections
import dataclasses
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
from etils import epath

from lemur_jax.checkpoint.reading import read_metadata, restore_params
from lemur_jax.common.errors import UserError
from lemur_jax.common.json_files import digest_of
from lemur_jax.config import RunConfig
from lemur_jax.parallel.mesh import make_mesh
from lemur_jax.sweep.law import check_same_start
from lemur_jax.sweep.runs import SweepRun, shares_of
from lemur_jax.telemetry.metrics import METRICS_FILE, MetricsWriter, read_metrics
from lemur_jax.text.tokenizer import Tokenizer
from lemur_jax.train.evaluate import Evaluations, EvaluationSteps, evaluate, open_held_out
from lemur_jax.train.history import RunHistory
from lemur_jax.train.initial import initial_params
from lemur_jax.train.step import Program

logger = logging.getLogger(__name__)

KINDS = ("linear", "arithmetic")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Merge:
    """One merged model: the start plus `weight` times what each of `parts` has learned."""

    kind: str
    weight: float
    parts: tuple[SweepRun, ...]

    @property
    def seed(self) -> int:
        return self.parts[0].seed

    @property
    def variant(self) -> str:
        """What merges that differ in their seed alone have in common."""
        return f"{' + '.join(part.variant for part in self.parts)}, {self.kind} {self.weight:g}"

    @property
    def name(self) -> str:
        """The name of its directory."""
        return f"{self.kind}-{self.weight:g}_{'+'.join(part.name for part in self.parts)}"

    def directory(self, workdir: epath.PathLike) -> epath.Path:
        """Where its figures lie, in the workdir of the sweep."""
        return epath.Path(workdir) / "merged" / self.name


def plan_merges(merges: Sequence[str], runs: Sequence[SweepRun]) -> list[Merge]:
    """The merged models of a sweep, those of one variant together; `merges` like "linear:0.5" and "arithmetic:0.5".

    Raises UserError for a text of another form, or arithmetic without two runs of one part of the data each.
    """
    models = []
    for text in merges:
        kind, weight = _parse(text)
        if kind == "linear":
            models += [Merge(kind=kind, weight=weight, parts=(run,)) for run in runs]
            continue
        by_settings = collections.defaultdict(list)
        for run in runs:
            if max(shares_of(run.ratio)) == 1:  # it sees one part of the data alone
                by_settings[run.settings, run.seed].append(run)
        groups = [tuple(by_settings[key]) for key in sorted(by_settings)]
        if not groups or min(map(len, groups)) < 2:
            raise UserError(
                f"--merge {text} adds up runs of one part of the data each: sweep two such ratios, e.g. 1:0,0:1"
            )
        models += [Merge(kind=kind, weight=weight, parts=group) for group in groups]
    return list(dict.fromkeys(models))  # one that is named twice would count as more seeds


def _parse(text: str) -> tuple[str, float]:
    kind, _, weight = text.partition(":")
    try:
        number = float(weight)
    except ValueError:
        number = math.nan
    if kind not in KINDS or not math.isfinite(number):
        raise UserError(
            f"cannot read --merge {text!r}: write linear:WEIGHT or arithmetic:WEIGHT, e.g. linear:0.5"
        )
    return kind, number


def merged(base: Any, trained: Iterable[Any], weight: float) -> Any:
    """base + weight · Σ (trained - base), leaf by leaf."""
    total = base
    for params in trained:
        total = jax.tree.map(lambda t, p, b: t + weight * (p - b), total, params, base)
    return total


def evaluate_all(
    merges: Sequence[Merge],
    configs: Mapping[SweepRun, RunConfig],
    workdir: epath.PathLike,
    build: Callable[..., Program],
) -> None:
    """Scores the merged models without figures of these runs, as the runs were scored at their end.

    Raises UserError where `config.init.checkpoint` is not what the runs began with, as of a base that was made again.
    """
    for number, merge in enumerate(merges, start=1):
        directory, first = merge.directory(workdir), merge.parts[0].directory(workdir)
        parts = [read_metadata(part.directory(workdir))["leaves"]["params"] for part in merge.parts]
        weights = [{name: leaf.digest for name, leaf in leaves.items()} for leaves in parts]
        provenance = {"step": 0, "kind": "merge", "weights": digest_of(weights)}
        if (directory / METRICS_FILE).exists() and provenance in read_metrics(directory):
            continue
        logger.info("merge %d of %d: %s, seed %d", number, len(merges), merge.variant, merge.seed)
        config = configs[merge.parts[0]]
        tokenizer = Tokenizer.from_config(config.tokenizer)
        program = build(config, make_mesh(config.mesh), len(config.data.sources))
        origins = read_metadata(first).get("origins", {})
        base = initial_params(config.init, config.seed, tokenizer, program, origins)
        held_out = open_held_out(config.data, config.eval, tokenizer)
        rows, records = config.train.microbatch_rows, read_metrics(first)
        scores = evaluate(program, base, held_out[0], config.eval.batch_rows or rows, config.eval.max_rows)
        assert scores  # nothing stops it
        check_same_start([{"step": 0, "kind": "eval", **scores}], records, config.init.checkpoint, first)
        trained = (restore_params(part.directory(workdir), program.state.params) for part in merge.parts)
        with MetricsWriter(directory) as writer:
            writer.truncate_after(-1)
            history = RunHistory(writer=writer, records=records)
            steps = EvaluationSteps(
                options=config.eval, checkpoint=config.checkpoint, init=config.init, last=config.train.steps
            )
            params = merged(base, trained, merge.weight)
            Evaluations(program, rows, steps, held_out, history).score(params, config.train.steps)
            writer.write(provenance)  # last: a merge without it is scored again
