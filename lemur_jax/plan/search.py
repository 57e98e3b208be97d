"""The best layout of a config's update on a slice, by compiling the promising ones in a bounded time.

What is chosen: the mesh, the rematerialization policy, the number of microbatches, and for the best so far also the
attention's blocks, the chunks of the loss, and more compiler options. Candidates come in the order of their analytic
time; what by its bounds cannot fit or cannot beat what was compiled is left out. Each compile is a process of its own
and leaves its plan in a cache.
"""

import dataclasses
import functools
import hashlib
import itertools
import json
import multiprocessing
import multiprocessing.connection
import pathlib
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from typing import Any

import jax

import lemur_jax
from lemur_jax.common.errors import UserError
from lemur_jax.config import RunConfig, replace, to_json
from lemur_jax.models.remat import POLICIES
from lemur_jax.plan import analytic, topologies
from lemur_jax.plan.cost import CHIPS
from lemur_jax.plan.plan import GIB, Plan, plan

# Ways to cut the heads; beyond eight the activations' sums cost more than anything that it saves.
TENSOR_WAYS = (1, 2, 4, 8)
# Rows are cut into pieces of at least so many positions: with fewer, keys and values are gathered for too little work.
SHORTEST_PIECE = 2048
# What is tried on the best layout, one at a time: the analytic bound knows none of it. Those that help add up, since
# what they make is the best in its turn.
_OPTIONS = "compute.compiler_options"
REFINEMENTS: tuple[tuple[str, Any], ...] = (
    ("compute.loss_chunk", 0),
    ("compute.loss_chunk", 2048),
    ("compute.attention_blocks", (1024, 0)),
    ("compute.attention_blocks", (0, 512)),
    ("compute.attention_blocks", (1024, 512)),
    ("compute.attention_blocks", (0, 2048)),
    (
        _OPTIONS,
        "xla_tpu_scheduler_percent_shared_memory_limit=110",
    ),  # memory that the scheduler may plan with
    (_OPTIONS, "xla_tpu_enable_async_collective_fusion_fuse_all_gather=true"),
)
# Part of the time that is for layouts alone; then the best one so far is refined, then come the other layouts.
_LAYOUTS_FIRST = 0.5
# Seconds between two looks at the clock while compiles run.
_PATIENCE = 1.0

# Sections of the config on which no plan depends; of `data` the length and the number of sources count.
_NOT_OF_THE_STEP = ("checkpoint", "data", "eval", "hosts", "init", "log", "prepare", "seed", "tokenizer")

Changes = dict[str, Any]
Process = multiprocessing.process.BaseProcess
# A fresh interpreter for each compile: what libtpu holds is given back when it ends.
_CONTEXT = multiprocessing.get_context("spawn")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Candidate:
    """Values of config keys, e.g. {"mesh.fsdp": 16}, and what they need at least."""

    changes: Changes
    bound: analytic.Bound

    @property
    def mesh(self) -> tuple[Any, ...]:
        return tuple(value for key, value in self.changes.items() if key.startswith("mesh."))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """A candidate that was compiled: its plan, or why there is none."""

    candidate: Candidate
    plan: Plan | None
    error: str = ""

    @property
    def changes(self) -> Changes:
        return self.candidate.changes

    @property
    def fits(self) -> bool:
        """Whether it fits and its time could be estimated."""
        return self.plan is not None and self.plan.step_seconds is not None

    @property
    def made(self) -> Plan:
        """The plan of one that was compiled."""
        assert self.plan is not None
        return self.plan

    @property
    def seconds(self) -> float:
        """Estimated, of one that fits."""
        assert self.made.step_seconds is not None
        return self.made.step_seconds

    @property
    def hbm(self) -> int:
        """Bytes a chip."""
        return self.made.hbm_bytes_per_chip


@dataclasses.dataclass(kw_only=True)
class Found:
    """What a search saw.

    Attributes:
      outcomes: compiled or read from the cache.
      compiled, cached: how many of each.
      pruned: reason -> candidates that were not compiled.
      untried: candidates left when the time was over.
      seconds: that the search took.
    """

    outcomes: list[Outcome] = dataclasses.field(default_factory=list)
    compiled: int = 0
    cached: int = 0
    pruned: dict[str, int] = dataclasses.field(default_factory=dict)
    untried: int = 0
    seconds: float = 0.0

    @property
    def best(self) -> Outcome | None:
        """The fastest that fits."""
        return next(iter(self.front()), None)

    def front(self) -> list[Outcome]:
        """Those that no other beats in both step time and HBM, fastest first."""
        ordered = sorted(
            (outcome for outcome in self.outcomes if outcome.fits),
            key=lambda outcome: (outcome.seconds, outcome.hbm),
        )
        front: list[Outcome] = []
        for outcome in ordered:
            if not front or outcome.hbm < front[-1].hbm:
                front.append(outcome)
        return front


def layouts(config: RunConfig, tpu: topologies.Slice) -> Iterator[Changes]:
    """Every mesh, policy and number of microbatches that could be."""
    devices = tpu.devices_per_slice * tpu.slices
    rows = config.train.batch_rows
    powers = [2**power for power in range(rows.bit_length()) if rows % 2**power == 0]
    pieces = range((config.data.sequence_length // SHORTEST_PIECE).bit_length())
    sequences = sorted({max(1, config.mesh.sequence), 1, *(2**power for power in pieces)})
    meshes = itertools.product(sequences, TENSOR_WAYS, range(tpu.slices, devices + 1, tpu.slices))
    for sequence, tensor, data in meshes:
        if devices % (tensor * data * sequence):
            continue
        mesh = {"mesh.data": data, "mesh.fsdp": devices // (tensor * data * sequence)}
        for remat, microbatches in itertools.product(POLICIES, powers):
            yield {
                **mesh,
                "mesh.sequence": sequence,
                "mesh.tensor": tensor,
                "compute.remat": remat,
                "train.microbatches": microbatches,
            }


def candidates(config: RunConfig, tpu: topologies.Slice, pruned: dict[str, int]) -> list[Candidate]:
    """The layouts that could fit, the most promising first; the others are counted in `pruned`."""
    limit = CHIPS[tpu.generation.name].hbm
    kept = []
    for changes in layouts(config, tpu):
        try:
            bound = analytic.bound(replace(config, changes), tpu)
        except UserError:
            _count(pruned, "the mesh does not divide the model or the batch")
            continue
        if bound.bytes > limit:
            _count(pruned, "cannot fit by its shapes")
        else:
            kept.append(Candidate(changes=changes, bound=bound))
    return sorted(kept, key=lambda each: (each.bound.serial, each.bound.bytes))


def _count(counts: dict[str, int], reason: str) -> None:
    counts[reason] = counts.get(reason, 0) + 1


def search(
    config: RunConfig,
    topology: str,
    *,
    slices: int = 1,
    minutes: float,
    processes: int,
    cache: pathlib.Path,
    say: Callable[[str], None] = print,
) -> Found:
    """Compiles candidates until the time is over, all are done, or Ctrl-C.

    Args:
      config: the base; what it says of mesh, remat and microbatches is left behind, and what it says of attention
        blocks and loss chunks is where the search begins.
      topology, slices: as for `plan`.
      minutes, processes: time in all, after which compiles under way are ended; compiles at a time.
      cache: directory of finished plans; made where missing.
      say: takes one line for each finished candidate.

    Raises:
      UserError: an unknown slice, or libtpu is missing.
    """
    started = time.monotonic()
    tpu = topologies.find(topology, slices)
    topologies.devices(tpu)  # without libtpu every compile would fail alike
    cache.mkdir(parents=True, exist_ok=True)
    found = Found()
    queue = candidates(config, tpu, found.pruned)
    say(f"{len(queue)} candidates, {sum(found.pruned.values())} dropped by their shapes")

    def finish(outcome: Outcome) -> None:
        found.outcomes.append(outcome)
        say(line(outcome))

    refined: list[Changes] = []

    def following() -> Candidate | None:
        early = time.monotonic() - started < 60 * minutes * _LAYOUTS_FIRST
        if early and (candidate := _next(queue, found)):
            return candidate
        for candidate in refinements(found.best, config) if found.best else ():
            if candidate.changes not in refined:
                refined.append(candidate.changes)
                return candidate
        return _next(queue, found)

    # By what tells that a process has ended.
    running: dict[Any, tuple[Process, Candidate, pathlib.Path]] = {}
    try:
        while time.monotonic() - started < 60 * minutes:
            while len(running) < processes and (candidate := following()):
                wanted = replace(config, candidate.changes)
                path = cache / f"{key(wanted, topology, slices)}.json"
                if path.exists():
                    found.cached += 1
                    finish(read(candidate, path))
                else:
                    process = _launch(wanted, topology, slices, path)
                    running[process.sentinel] = (process, candidate, path)
            if not running:
                break
            for ended in multiprocessing.connection.wait(list(running), timeout=_PATIENCE):
                process, candidate, path = running.pop(ended)
                process.join()
                found.compiled += 1
                finish(read(candidate, path, process.exitcode))
    except KeyboardInterrupt:
        say("stopped: what was found so far counts")
    finally:
        for process, *_ in running.values():
            process.kill()  # on the milder signal libtpu prints a page; a plan is at its place whole or not at all
    found.untried = len(queue) + len(running)
    found.seconds = time.monotonic() - started
    return found


def _launch(*arguments) -> Process:
    """Starts `compile_to` with these arguments; it dies with this process."""
    process = _CONTEXT.Process(target=compile_to, args=arguments, daemon=True)
    process.start()
    return process


def refinements(best: Outcome, config: RunConfig) -> Iterator[Candidate]:
    """The best so far with one more value changed, of a key that has its first value still."""
    for name, value in REFINEMENTS:
        changes = {**best.changes, name: value}
        if name == _OPTIONS:
            given = best.changes.get(name, config.compute.compiler_options)
            if value in given:
                continue
            changes[name] = (*given, value)
        elif name in best.changes:
            continue
        yield Candidate(changes=changes, bound=best.candidate.bound)


def _next(queue: list[Candidate], found: Found) -> Candidate | None:
    """The next layout that is worth a compile; those before it are counted as pruned."""
    while queue:
        candidate = queue.pop(0)
        reason = _hopeless(candidate, found)
        if not reason:
            return candidate
        _count(found.pruned, reason)
    return None


def _hopeless(candidate: Candidate, found: Found) -> str:
    """Why a candidate need not be compiled; "" if it must be."""
    for outcome in found.outcomes:
        if outcome.plan is None:
            continue
        if outcome.fits and (
            outcome.seconds <= candidate.bound.seconds and outcome.hbm <= candidate.bound.bytes
        ):
            return "cannot beat one that was compiled"
        same = outcome.changes["compute.remat"] == candidate.changes["compute.remat"]
        # A refined one may have failed for what was refined.
        plain = outcome.changes.keys() == candidate.changes.keys()
        alike = same and plain and outcome.candidate.mesh == candidate.mesh
        if alike and not outcome.plan.fits and outcome.candidate.bound.bytes <= candidate.bound.bytes:
            return "needs more than one that did not fit"
    return ""


def compile_to(config: RunConfig, topology: str, slices: int, path: pathlib.Path) -> None:
    """Plans a config and leaves the JSON at `path`, whole or not at all."""
    try:
        text = plan(config, topology, slices=slices).to_json()
    except UserError as error:
        text = json.dumps({"error": str(error)})
    part = path.with_suffix(".part")
    part.write_text(text)
    part.rename(path)


def read(candidate: Candidate, path: pathlib.Path, exit_code: int | None = 0) -> Outcome:
    """What a compile left in the cache."""
    if not path.exists():
        error = f"the compile ended with exit code {exit_code}"
        return Outcome(candidate=candidate, plan=None, error=error)
    facts = json.loads(path.read_text())
    if "error" in facts:
        return Outcome(candidate=candidate, plan=None, error=facts["error"])
    return Outcome(candidate=candidate, plan=Plan(**facts))


def key(config: RunConfig, topology: str, slices: int) -> str:
    """Names what a plan depends on: the options of the step, the slice, jax, libtpu, and the package's own source."""
    facts = {name: value for name, value in to_json(config).items() if name not in _NOT_OF_THE_STEP}
    facts |= {
        "sequence_length": config.data.sequence_length,
        "sources": len(config.data.sources),
        "slice": [topology, slices],
        "versions": [jax.__version__, metadata.version("libtpu")],
        "package": source_digest(),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


@functools.cache
def source_digest() -> str:
    """Of the modules that make the step and the estimate."""
    root = pathlib.Path(lemur_jax.__file__).parent
    digest = hashlib.sha256()
    for room in ("models", "parallel", "plan", "train"):
        for file in sorted((root / room).glob("*.py")):
            digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()


def line(outcome: Outcome) -> str:
    """One line for a finished candidate."""
    what = describe(outcome.changes)
    if outcome.plan is None:
        return f"  refused         {what}: {outcome.error}"
    size = f"{outcome.plan.hbm_bytes_per_chip / GIB:6.2f} GiB"
    if outcome.plan.step_seconds is None:
        return f"  does not fit  {size}  {what}"
    return f"  {outcome.plan.step_seconds:10.3f} s  {size}  {what}"


def describe(changes: Changes) -> str:
    """The values of a candidate in a few words."""
    mesh = " ".join(
        f"{name.removeprefix('mesh.')} {value}"
        for name, value in changes.items()
        if name.startswith("mesh.") and value > 1
    )
    words = [mesh or "one device", changes["compute.remat"], f"microbatches {changes['train.microbatches']}"]
    for name, value in changes.items():
        if name in ("compute.loss_chunk", "compute.attention_blocks"):
            words.append(f"{name.removeprefix('compute.')} {value}")
    return ", ".join([*words, *changes.get(_OPTIONS, ())])
