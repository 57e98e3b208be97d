"""Searches the best layout of a config's update on a slice by compiling promising ones in a bounded time.

A layout is a mesh, a rematerialization policy and a number of microbatches. The config's own comes first, then the
others by their analytic time, first those that fit if they exceed their bound as what was compiled does. What cannot
fit by its bounds, or cannot beat a compiled one, is skipped. The best one is then refined: blocks of the attention
kernels, chunks of the loss, more compiler options. Each compilation is a process of its own and leaves its plan in a
cache.
"""

import collections
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import logging
import math
import multiprocessing
import multiprocessing.connection
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from typing import Any

import jax

import lemur_jax
from lemur_jax.common.errors import UserError
from lemur_jax.config import RunConfig, replace
from lemur_jax.models.remat import POLICIES
from lemur_jax.parallel.compiler_flags import compiler_options
from lemur_jax.parallel.config import MeshConfig
from lemur_jax.parallel.mesh import AXES, mesh_shape
from lemur_jax.plan import analytic
from lemur_jax.plan.plan import GIB, Plan, plan
from lemur_jax.plan.topologies import Slice, described_devices, find_slice

logger = logging.getLogger(__name__)

# Sizes of the mesh axis `tensor`; beyond eight the sums of activations cost more than they save.
TENSOR_WAYS = (1, 2, 4, 8)
# Rows are cut into pieces of at least this many positions; shorter pieces gather keys and values for too little work.
SHORTEST_PIECE = 2048
# Tried on the best layout, one value at a time, because the analytic bound does not know them. What helps is kept and
# refined further.
OPTIONS = "compute.compiler_options"
GATE_SHARE = "compute.gate_share"
REFINEMENTS: tuple[tuple[str, Any], ...] = (
    *((GATE_SHARE, share) for share in (0.625, 0.75, 0.5, 0.25)),
    ("compute.loss_chunk", 0),
    ("compute.loss_chunk", 2048),
    ("compute.attention_blocks", (1024, 0)),
    ("compute.attention_blocks", (0, 512)),
    ("compute.attention_blocks", (1024, 512)),
    ("compute.attention_blocks", (0, 2048)),
    (OPTIONS, "xla_tpu_scheduler_percent_shared_memory_limit=110"),  # memory that the scheduler may plan with
    (OPTIONS, "xla_tpu_enable_async_collective_fusion_fuse_all_gather=true"),
    (OPTIONS, "xla_tpu_enable_async_all_to_all=false"),  # gradients by all-reduces
    (OPTIONS, "xla_tpu_scoped_vmem_limit_kib=65536"),  # larger tiles; compiles up to four times longer
)
_SHARE_GAINS = 0.95  # what a share of the gate can leave of a step: of Llama-2-70B's on v5p-128
# Share of the time for layouts alone; then the best one is refined, and then the other layouts follow.
_LAYOUTS_FIRST = 0.5
# Seconds between two looks at the clock while compilations run.
_POLL = 1.0

# Sections of the config on which no plan depends; of `data` the length and the number of sources count.
_NOT_OF_THE_STEP = ("checkpoint", "data", "eval", "hosts", "init", "log", "prepare", "seed", "tokenizer")

Changes = dict[str, Any]
# A fresh interpreter for each compilation: the memory of libtpu is returned when it ends.
_CONTEXT = multiprocessing.get_context("spawn")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Candidate:
    """Values of config keys, e.g. {"mesh.fsdp": 16}, and the lower bounds of their cost."""

    changes: Changes
    bound: analytic.Bound


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trial(Candidate):
    """A compiled candidate: its plan, or the error."""

    plan: Plan | None = None
    error: str = ""

    @property
    def fits(self) -> bool:
        """Whether it fits and its time could be estimated."""
        return self.plan is not None and self.plan.step_seconds is not None


@dataclasses.dataclass(kw_only=True)
class SearchResult:
    """The result of a search.

    Attributes:
      trials: compiled or read from the cache.
      compiled, cached: the number of each.
      pruned: reason -> number of candidates that were not compiled.
      untried: candidates left when the time was over.
      seconds: duration of the search.
    """

    trials: list[Trial] = dataclasses.field(default_factory=list)
    compiled: int = 0
    cached: int = 0
    pruned: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    untried: int = 0
    seconds: float = 0.0

    @property
    def best(self) -> Trial | None:
        """The fastest that fits."""
        return next(iter(self.front()), None)

    def front(self) -> list[Trial]:
        """The Pareto front of step time and HBM, fastest first."""
        front: list[Trial] = []
        fitting = (trial for trial in self.trials if trial.fits)
        for trial in sorted(fitting, key=lambda each: (each.plan.step_seconds, each.plan.hbm_bytes_per_chip)):
            if not front or trial.plan.hbm_bytes_per_chip < front[-1].plan.hbm_bytes_per_chip:
                front.append(trial)
        return front


def layouts(mesh: MeshConfig, rows: int, length: int, tpu: Slice) -> Iterator[Changes]:
    """Every possible mesh, policy and number of microbatches; the axis `expert` is that of `mesh`."""
    powers = [2**power for power in range(rows.bit_length()) if rows % 2**power == 0]
    pieces = range((length // SHORTEST_PIECE).bit_length())
    sequences = sorted({max(1, mesh.sequence), 1, *(2**power for power in pieces)})
    meshes = itertools.product(sequences, TENSOR_WAYS, range(tpu.slices, tpu.devices + 1, tpu.slices))
    for sequence, tensor, data in meshes:
        fsdp, rest = divmod(tpu.devices, tensor * data * sequence * mesh.expert)
        if rest or not fsdp:
            continue
        sizes = {"mesh.data": data, "mesh.fsdp": fsdp, "mesh.sequence": sequence, "mesh.tensor": tensor}
        for remat, microbatches in itertools.product(POLICIES, powers):
            yield {**sizes, "compute.remat": remat, "train.microbatches": microbatches}


def candidates(config: RunConfig, tpu: Slice, result: SearchResult) -> list[Candidate]:
    """The layouts that could fit, the config's own and then the most promising first.

    The others are counted in `result.pruned`.
    """
    kept: list[Candidate] = []
    own: Changes = {}
    with contextlib.suppress(UserError):  # it may be for another slice
        shape = zip(AXES, mesh_shape(config.mesh, tpu.devices), strict=True)
        own = {f"mesh.{axis}": size for axis, size in shape if axis != "expert"}
        own |= {"compute.remat": config.compute.remat, "train.microbatches": config.train.microbatches}
    every = layouts(config.mesh, config.train.batch_rows, config.data.sequence_length, tpu)
    # Only the config's own layout has its share of the gate: other policies may keep the whole.
    without = {GATE_SHARE: 0.0} if config.compute.gate_share else {}
    others = (changes | without for changes in every if changes != own)
    for changes in filter(None, (own, *others)):
        try:
            bound = analytic.lower_bound(replace(config, changes), tpu)
        except UserError:
            result.pruned["the mesh does not divide the model or the batch"] += 1
            continue
        if bound.bytes > tpu.generation.hbm:
            result.pruned["cannot fit by its shapes"] += 1
        else:
            kept.append(Candidate(changes=changes, bound=bound))
    return sorted(kept, key=lambda each: (each.changes != own, each.bound.likely_seconds, each.bound.bytes))


def search(
    config: RunConfig, topology: str, *, slices: int = 1, minutes: float, processes: int, cache: pathlib.Path
) -> SearchResult:
    """Compiles candidates until the time is over, all are done, or Ctrl-C; logs a line for each.

    If nothing fits when the time is over, it continues until something does.

    Args:
      config: the base. Its mesh, remat and microbatches are replaced; its attention blocks, loss chunks and compiler
        options are where the search begins.
      topology, slices: as for `plan`.
      minutes: total time; compilations that still run then are ended, if something fits.
      processes: compilations at a time.
      cache: directory of finished plans, created if missing.

    Raises:
      UserError: an unknown slice, or libtpu is missing.
    """
    started = time.monotonic()
    tpu = find_slice(topology, slices)
    described_devices(tpu)  # every compilation would fail without libtpu
    cache.mkdir(parents=True, exist_ok=True)
    result = SearchResult()
    queue = _Queue(config.compute.compiler_options, tpu, candidates(config, tpu, result), result)
    refine_at, end = started + 60 * minutes * _LAYOUTS_FIRST, started + 60 * minutes
    logger.info("%d candidates, %d dropped by their shapes", len(queue.layouts), sum(result.pruned.values()))
    # By the sentinel that says that a process has ended.
    running: dict[Any, tuple[Any, Candidate, pathlib.Path]] = {}
    try:
        while time.monotonic() < end or not result.best:
            refine = time.monotonic() >= refine_at
            while len(running) < processes and (candidate := queue.next(refine)):
                try:
                    wanted = replace(config, candidate.changes)
                except UserError:  # e.g. a share of the gate where the policy keeps all of it
                    continue
                path = cache / f"{cache_key(wanted.to_json(), topology, slices)}.json"
                if path.exists():
                    result.cached += 1
                    _finish(result, candidate, path)
                    continue
                make = functools.partial(plan, wanted, topology, slices=slices)
                process = _CONTEXT.Process(target=write_plan, args=(make, path), daemon=True)
                process.start()
                running[process.sentinel] = (process, candidate, path)
            if not running:
                break
            for ended in multiprocessing.connection.wait(list(running), timeout=_POLL):
                process, candidate, path = running.pop(ended)
                process.join()
                result.compiled += 1
                _finish(result, candidate, path, process.exitcode)
    except KeyboardInterrupt:
        logger.info("stopped; the results so far are kept")
    finally:
        for process, *_ in running.values():
            process.kill()  # libtpu prints a page on SIGTERM; plans are written whole or not at all
    result.untried = len(queue.layouts) + len(running)
    result.seconds = time.monotonic() - started
    return result


def _finish(
    result: SearchResult, candidate: Candidate, path: pathlib.Path, exit_code: int | None = 0
) -> None:
    """Adds the result of a compilation from the cache, and logs it."""
    facts: dict[str, Any] = {"error": f"the compilation ended with exit code {exit_code}"}
    if path.exists():
        facts = json.loads(path.read_text())
    if "error" in facts:
        trial = Trial(changes=candidate.changes, bound=candidate.bound, error=facts["error"])
        outcome = f"refused         {facts['error']}: "
    else:
        trial = Trial(changes=candidate.changes, bound=candidate.bound, plan=Plan(**facts))
        time_of = f"{trial.plan.step_seconds:10.3f} s" if trial.fits else "does not fit"
        outcome = f"{time_of}  {trial.plan.hbm_bytes_per_chip / GIB:6.2f} GiB  "
    result.trials.append(trial)
    logger.info("  %s%s", outcome, format_changes(trial.changes))


class _Queue:
    """The order in which candidates are compiled."""

    def __init__(self, options: tuple[str, ...], tpu: Slice, layouts: list[Candidate], result: SearchResult):
        """`options`: the compiler options with which the search begins."""
        self.options, self.tpu, self.layouts, self.result = options, tpu, layouts, result
        self._refined: list[Changes] = []

    def next(self, refine: bool) -> Candidate | None:
        """The next candidate that is worth a compilation; with `refine`, first of those of the best."""
        if not refine and (candidate := self._next_layout()):
            return candidate
        for candidate in self._refinements():
            if candidate.changes not in self._refined:
                self._refined.append(candidate.changes)
                return candidate
        return self._next_layout()

    def _refinements(self) -> Iterator[Candidate]:
        """Shares of the gate for all that are nearly as fast as the best, then the rest for the best."""
        best = self.result.best
        if best is None:
            return
        kind, limit = self.tpu.generation.device_kind, best.plan.step_seconds / _SHARE_GAINS
        for trial in self.result.trials:
            if trial.fits and trial.plan.step_seconds <= limit:
                tried = refinements(trial, self.options, kind)
                share = trial.changes.get(GATE_SHARE)
                yield from (each for each in tried if each.changes.get(GATE_SHARE) != share)
        yield from refinements(best, self.options, kind)

    def _next_layout(self) -> Candidate | None:
        while self.layouts:
            candidate = next(filter(self._fits_likely, self.layouts), None)
            candidate = candidate or min(self.layouts, key=self._likely_bytes)
            self.layouts.remove(candidate)
            reason = _reason_to_skip(candidate, self.result)
            if not reason:
                return candidate
            self.result.pruned[reason] += 1
        return None

    def _fits_likely(self, candidate: Candidate) -> bool:
        return self._likely_bytes(candidate) <= self.tpu.generation.hbm

    def _likely_bytes(self, candidate: Candidate) -> float:
        """The bound times what compiled programs need of theirs: those of the same policy, else all."""
        ratios = [
            (trial.changes["compute.remat"], _device_hbm(trial) / trial.bound.bytes)
            for trial in self.result.trials
            if trial.plan and trial.plan.hbm_bytes_per_chip
        ]
        alike = [ratio for remat, ratio in ratios if remat == candidate.changes["compute.remat"]]
        known = alike or [ratio for _, ratio in ratios] or [1.0]
        return candidate.bound.bytes * sum(known) / len(known)


def _device_hbm(trial: Trial) -> float:
    """HBM of a device, as in the bounds; a plan states that of a chip."""
    assert trial.plan is not None
    return trial.plan.hbm_bytes_per_chip * trial.plan.chips / math.prod(trial.plan.mesh.values())


def refinements(best: Trial, options: tuple[str, ...], device_kind: str) -> Iterator[Candidate]:
    """The best so far with one more value changed: any share of the gate, else of a key that still has its first value.

    Args:
      options: the compiler options with which the search began.
      device_kind: of the slice; what is on there already is not tried.
    """
    for name, value in REFINEMENTS:
        changes = {**best.changes, name: value}
        if name == OPTIONS:
            given = best.changes.get(name, options)
            if compiler_options(device_kind, (*given, value)) == compiler_options(device_kind, given):
                continue
            changes[name] = (*given, value)
        elif name in best.changes and name != GATE_SHARE:
            continue
        yield Candidate(changes=changes, bound=best.bound)


def _reason_to_skip(candidate: Candidate, result: SearchResult) -> str:
    """Why a candidate need not be compiled; "" if it must be."""
    bound = candidate.bound
    for trial in result.trials:
        smaller = trial.fits and _device_hbm(trial) <= bound.bytes
        if smaller and trial.plan.step_seconds <= bound.seconds:
            return "cannot beat one that was compiled"
        # A refined trial has more keys: it may have failed because of the refinement.
        alike = {**trial.changes, "train.microbatches": 0} == {**candidate.changes, "train.microbatches": 0}
        if alike and trial.plan and not trial.plan.fits and trial.bound.bytes <= bound.bytes:
            return "needs more than one that did not fit"
    return ""


def write_plan(make: Callable[[], Plan], path: pathlib.Path) -> None:
    """Makes a plan and writes its JSON, or the error, to `path`, whole or not at all."""
    try:
        text = make().to_json()
    except UserError as error:
        text = json.dumps({"error": str(error)})
    part = path.with_suffix(".part")
    part.write_text(text)
    part.rename(path)


def cache_key(values: Mapping[str, Any], topology: str, slices: int) -> str:
    """Digest of what a plan depends on: options of the step, slice, jax, libtpu, and the package's own source."""
    facts = {name: value for name, value in values.items() if name not in _NOT_OF_THE_STEP}
    facts |= {
        "sequence_length": values["data"]["sequence_length"],
        "sources": len(values["data"]["sources"]),
        "slice": [topology, slices],
        "versions": [jax.__version__, metadata.version("libtpu")],
        "package": _source_digest(),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


@functools.cache
def _source_digest() -> str:
    """Of the modules that make the step and the estimate."""
    root = pathlib.Path(lemur_jax.__file__).parent
    digest = hashlib.sha256()
    for package in ("models", "parallel", "plan", "train"):
        for file in sorted((root / package).glob("*.py")):
            digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()


def format_changes(changes: Changes) -> str:
    """The values of a candidate, e.g. "fsdp 16, mlp, microbatches 2"."""
    sizes = [
        f"{name.removeprefix('mesh.')} {value}"
        for name, value in changes.items()
        if name.startswith("mesh.") and value > 1
    ]
    mesh = " ".join(sizes)
    words = [mesh or "one device", changes["compute.remat"], f"microbatches {changes['train.microbatches']}"]
    for name in (GATE_SHARE, "compute.loss_chunk", "compute.attention_blocks"):
        if name in changes:
            words.append(f"{name.removeprefix('compute.')} {changes[name]}")
    return ", ".join([*words, *changes.get(OPTIONS, ())])
