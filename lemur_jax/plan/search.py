"""Searches the best layout of a config's update on a slice by compiling promising ones in a bounded time.

The config's own layout comes first, then always the candidate that `plan/candidates.py` expects to be the fastest:
another layout, or the best one so far with a refinement. What cannot fit by its bounds, or cannot beat a compiled one,
is skipped. Each compilation is a process of its own and leaves its plan in a cache.
"""

import collections
import contextlib
import dataclasses
import functools
import json
import logging
import multiprocessing
import multiprocessing.connection
import os
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from typing import Any

import jax
from etils import epath

from lemur_jax.common.errors import UserError
from lemur_jax.common.json_files import digest_of, write_json
from lemur_jax.config import RunConfig, replace
from lemur_jax.models.config import ComputeConfig
from lemur_jax.parallel.compiler_flags import compiler_options
from lemur_jax.parallel.mesh import mesh_shape
from lemur_jax.plan import analytic, candidates
from lemur_jax.plan.candidates import Candidate, Changes, Trial
from lemur_jax.plan.plan import GIB, Plan, plan
from lemur_jax.plan.topologies import Slice, described_devices, find_slice
from lemur_jax.telemetry.provenance import code_digest

logger = logging.getLogger(__name__)

# Seconds between two checks of the clock while compilations run.
_POLL = 1.0

# Sections of the config on which no plan depends; of `data` the length and the number of sources count.
_NOT_OF_THE_STEP = ("checkpoint", "data", "eval", "hosts", "init", "log", "prepare", "seed", "tokenizer")

# A fresh interpreter for each compilation: the memory of libtpu is returned when it ends.
_CONTEXT = multiprocessing.get_context("spawn")


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

    @property
    def all_refused(self) -> bool:
        """Whether something was tried, and nothing of it has a plan."""
        return bool(self.trials) and not any(trial.plan for trial in self.trials)

    def front(self) -> list[Trial]:
        """The Pareto front of step time and HBM, fastest first."""
        front: list[Trial] = []
        fitting = (trial for trial in self.trials if trial.fits)
        for trial in sorted(fitting, key=lambda each: (each.seconds, each.plan.hbm_bytes_per_chip)):
            if not front or trial.plan.hbm_bytes_per_chip < front[-1].plan.hbm_bytes_per_chip:
                front.append(trial)
        return front


def all_layouts(config: RunConfig, tpu: Slice, result: SearchResult) -> list[Candidate]:
    """The layouts that could fit, the config's own first; the others are counted in `result.pruned`."""
    own: Changes = {}
    with contextlib.suppress(UserError):  # it may be for another slice
        sizes = mesh_shape(config.mesh, tpu.devices)
        own = candidates.layout_changes(sizes, config.compute, config.train.microbatches)
    all_changes = candidates.layouts(config.mesh, config.train.batch_rows, config.data.sequence_length, tpu)
    kept: list[Candidate] = []
    for changes in filter(None, (own, *(each for each in all_changes if each != own))):
        try:
            bound = analytic.lower_bound(replace(config, changes), tpu)
        except UserError:
            result.pruned["the model, the batch or the config does not allow it"] += 1
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

    If nothing fits when the time is over, it continues until something does, unless all that was tried was refused,
    e.g. for a compiler option that XLA does not know.

    Args:
      config: the base. Its mesh, remat, share of the gate and microbatches are replaced; its attention blocks, loss
        chunks and compiler options are where the search begins.
      topology, slices: as for `plan`.
      minutes: total time; compilations that still run then are ended, if something fits.
      processes: compilations at a time.
      cache: directory of finished plans, created if missing.

    Raises:
      UserError: an unknown slice or compiler option, libtpu is missing, or the axis `expert` has no size.
    """
    started = time.monotonic()
    tpu = find_slice(topology, slices)
    _check(config.mesh.expert, config.compute.compiler_options, tpu)
    cache.mkdir(parents=True, exist_ok=True)
    result = SearchResult()
    queue = Queue(all_layouts(config, tpu, result), config.compute, tpu, result)
    deadline = started + 60 * minutes
    logger.info("%d candidates, %d dropped by their shapes", len(queue.layouts), sum(result.pruned.values()))
    # By the sentinel, which becomes ready when the process ends.
    running: dict[Any, tuple[Any, Candidate, pathlib.Path]] = {}
    try:
        while time.monotonic() < deadline or not (result.best or result.all_refused):
            while len(running) < processes and (candidate := queue.next()):
                try:
                    trial_config = replace(config, candidate.changes)
                except UserError:  # a refinement that the config does not allow
                    continue
                path = cache / f"{cache_key(trial_config.to_json(), topology, slices)}.json"
                if path.exists():
                    result.cached += 1
                    _finish(result, candidate, path)
                    continue
                make = functools.partial(plan, trial_config, topology, slices=slices)
                process = _CONTEXT.Process(target=write_plan, args=(make, path), daemon=True)
                process.start()
                running[process.sentinel] = (process, candidate, path)
            if not running:
                break
            for sentinel in multiprocessing.connection.wait(list(running), timeout=_POLL):
                process, candidate, path = running.pop(sentinel)
                process.join()
                result.compiled += 1
                _finish(result, candidate, path, process.exitcode)
    except KeyboardInterrupt:
        logger.info("stopped; the results so far are kept")
    finally:
        for process, *_ in running.values():
            process.kill()  # libtpu prints a page on SIGTERM; plans are written whole or not at all
    result.untried = queue.left + len(running)
    result.seconds = time.monotonic() - started
    return result


def _check(expert: int, options: Sequence[str], tpu: Slice) -> None:
    """Refuses what would make every compilation fail."""
    if expert < 1:
        raise UserError("--search chooses the other axes: give config.mesh.expert a size")
    described_devices(tpu)
    compiler_options(tpu.generation.device_kind, options)


def _finish(
    result: SearchResult, candidate: Candidate, path: pathlib.Path, exit_code: int | None = 0
) -> None:
    """Adds the result of a compilation from the cache, and logs it."""
    facts: dict[str, Any] = {"error": f"the compilation ended with exit code {exit_code}"}
    if path.exists():
        facts = json.loads(path.read_text())
    if facts.get("retry"):
        path.unlink()
    error = facts.get("error", "")
    made = None if error else Plan(**facts)
    trial = Trial(changes=candidate.changes, bound=candidate.bound, plan=made, error=error)
    outcome = f"refused         {error}: "
    if made:
        time_of = f"{trial.seconds:10.4g} s" if trial.fits else "does not fit"
        outcome = f"{time_of}  {made.hbm_bytes_per_chip / GIB:6.2f} GiB  "
    result.trials.append(trial)
    logger.info("  %s%s", outcome, candidates.format_changes(trial.changes))


class Queue:
    """Gives the candidates, the one that is expected to be the fastest first."""

    def __init__(self, layouts: list[Candidate], compute: ComputeConfig, tpu: Slice, result: SearchResult):
        """`compute`: with which the search begins; `result`: of the compilations so far."""
        self.layouts, self.compute, self.tpu, self.result = layouts, compute, tpu, result
        self.left = len(layouts)
        self._given: list[Changes] = []

    def next(self) -> Candidate | None:
        """The first layout, then what is expected to be the fastest; None if all were given."""
        candidate = self.layouts[0] if not self._given and self.layouts else self._fastest()
        if candidate:
            self._given.append(candidate.changes)
            self.left -= 1
        return candidate

    def _fastest(self) -> Candidate | None:
        """Chooses among all layouts, each with the refinement of the best, and the refinements of the best."""
        trials, best = self.result.trials, self.result.best
        expected: list[tuple[Candidate, float]] = []
        remaining = []
        for layout in self.layouts:
            if reason := candidates.reason_to_skip(layout, trials):
                if not any(layout.changes.items() <= given.items() for given in self._given):
                    self.result.pruned[reason] += 1
                continue
            remaining.append(layout)
            refined = layout.changes | best.refinement if best else layout.changes
            candidate = dataclasses.replace(layout, changes=refined)
            expected.append((candidate, candidates.likely_seconds(candidate, trials)))
        self.layouts = remaining
        if best:
            expected += candidates.refinements(best, self.compute, self.tpu.generation.device_kind)
        untried = [
            (candidate, seconds) for candidate, seconds in expected if candidate.changes not in self._given
        ]
        self.left = len(untried)
        return min(untried, key=self._cost, default=(None, 0.0))[0]

    def _cost(self, expected: tuple[Candidate, float]) -> tuple[bool, float]:
        """Sort key: seconds if it is likely to fit; the others come last, by size."""
        candidate, seconds = expected
        filled = candidates.likely_bytes(candidate, self.result.trials) / self.tpu.generation.hbm
        return filled > 1, filled if filled > 1 else seconds * (1 + candidates.COST_OF_MEMORY * filled)


def write_plan(make: Callable[[], Plan], path: pathlib.Path) -> None:
    """Makes a plan and writes its JSON, or the error, to `path`, whole or not at all.

    What the user can fix, such as a missing package, is tried again by the next search.
    """
    try:
        facts = dataclasses.asdict(make())
    except (UserError, jax.errors.JaxRuntimeError) as error:
        facts = {"error": str(error).partition("\n")[0], "retry": isinstance(error, UserError)}
    write_json(epath.Path(path), facts)


def cache_key(values: Mapping[str, Any], topology: str, slices: int) -> str:
    """Digest of what a plan depends on: options of the step and of the compiler, slice, versions, our own source."""
    facts = {name: value for name, value in values.items() if name not in _NOT_OF_THE_STEP}
    facts |= {
        "sequence_length": values["data"]["sequence_length"],
        "sources": len(values["data"]["sources"]),
        "slice": [topology, slices],
        "flags": [os.environ.get(name) for name in ("LIBTPU_INIT_ARGS", "XLA_FLAGS")],
        "versions": [jax.__version__, metadata.version("libtpu")],
        "package": code_digest(),
    }
    return digest_of(facts)[:32]
