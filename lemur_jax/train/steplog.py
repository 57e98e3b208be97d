"""Metrics of the steps: kept on the device until a moment when the host may wait.

docs/metrics.md says what each record holds, with units.
"""

import collections
import contextlib
import logging
import math
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import jax
import numpy as np

from lemur_jax.cluster import coordination
from lemur_jax.common.errors import Diverged
from lemur_jax.common.progress import Progress
from lemur_jax.telemetry.flops import chip, mfu, train_flops_per_token
from lemur_jax.telemetry.goodput import time_record
from lemur_jax.telemetry.provenance import start_record
from lemur_jax.train.history import RunHistory
from lemur_jax.train.step import Program

logger = logging.getLogger(__name__)

_Item = TypeVar("_Item")


class BatchSource(Protocol):
    """What the batches of a run are made of: a mixture, or episodes."""

    batch_rows: int
    length: int

    @property
    def sources(self) -> Sequence[Any]: ...  # each has a `name`

    def documents(self, step: int, rows: Any) -> list[str]:
        """Names of the documents in rows of a batch."""
        ...

    def digests(self) -> Mapping[str, Any]:
        """Of each source's data, which must not change during the run."""
        ...


class StepLog:
    """Collects what `Program.step` returns and writes it out in batches.

    Between two flushes nothing is read back, so the device always has the next step queued. `mixture` names the
    sources, and the documents of a bad batch; `began` is `time.perf_counter()` when the run began; `tokens` are those
    of the checkpoint from which it continues, for the case that there are no records of earlier steps.
    """

    def __init__(
        self,
        history: RunHistory,
        progress: Progress,
        mixture: BatchSource,
        program: Program,
        began: float,
        tokens: Mapping[str, int],
    ):
        self._writer = history.writer
        self._progress = progress
        self._mixture = mixture
        # Target tokens since step 0, of all sources and of each, by their keys in a record.
        names = ["tokens", *(f"tokens/{source.name}" for source in mixture.sources)]
        last = next((record for record in reversed(history.records) if record.get("kind") == "train"), tokens)
        self.tokens = {name: last.get(name, 0) for name in names}
        self._pending: list[tuple[int, dict[str, jax.Array]]] = []
        self._since = time.perf_counter()
        self._program = program
        self._data_wait = 0.0
        self._taken: float | None = None  # when the current batch was ready
        self._dispatch_seconds = 0.0  # seconds spent on dispatching steps to the devices since the last flush
        # Wall seconds of the run by what they went to.
        self._spent = collections.defaultdict(float, history.spent)
        self._wall_before = self._spent.pop("wall", 0.0)
        self._began = began
        self._spent["startup"] += self._since - self._began
        self._compiled = False

    def waiting(self, batches: Generator[_Item, None, None]) -> Iterator[_Item]:
        """The same items; time spent waiting for them is counted as `data_wait_seconds`."""
        with contextlib.closing(batches):  # ends the thread that reads ahead, however the loop is left
            started = time.perf_counter()
            for item in batches:
                self._taken = time.perf_counter()
                self._data_wait += self._taken - started
                yield item
                started = time.perf_counter()

    def add(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Takes the metrics of the update that made the step counter `step`."""
        if self._taken is not None:
            seconds = time.perf_counter() - self._taken
            if self._compiled:
                self._dispatch_seconds += seconds
            else:
                # The first call returns when the program is compiled; later ones return at once, or when the devices
                # can take another step.
                self._spent["compile"] += seconds
                self._since += seconds
                self._compiled = True
        self._pending.append((step, metrics))

    def flush(self, keep: int = 0) -> None:
        """Reads back and writes all steps but the newest `keep`.

        A UserError names the step and the documents of a loss or a gradient that is not finite.
        """
        ready = self._pending[: len(self._pending) - keep]
        if not ready:
            return
        self._pending = self._pending[len(ready) :]
        flush_start = time.perf_counter()
        fetched = jax.device_get([metrics for _, metrics in ready])
        fetched_at = time.perf_counter()
        # Without the waits for the devices, in which every host waits for the slowest one: for results here, and for
        # the queue when a step is dispatched.
        coordination.publish("seconds", (flush_start - self._since - self._dispatch_seconds) / len(ready))
        self._dispatch_seconds = 0.0
        seconds = (fetched_at - self._since) / len(ready)
        self._since = fetched_at
        data_wait, self._data_wait = self._data_wait / len(ready), 0.0
        self._spent["data_wait"] += data_wait * len(ready)
        self._spent["steps"] += (seconds - data_wait) * len(ready)
        hosts = {f"host_seconds/{host}": value for host, value in coordination.published("seconds").items()}
        for (step, _), metrics in zip(ready, fetched, strict=True):
            skipped = metrics.get("skips_in_a_row", 0) > 0
            if not skipped:
                self._check_finite(step, metrics)
            self.tokens["tokens"] += int(metrics["source_tokens"].sum())
            for source, tokens in zip(self._mixture.sources, metrics["source_tokens"], strict=True):
                self.tokens[f"tokens/{source.name}"] += int(tokens)
            record = self._record(step, metrics, seconds) | {"data_wait_seconds": data_wait} | hosts
            if self._writer:
                self._writer.write(record)
            if skipped:
                self._record_skip(step, metrics)
        self._progress.set_postfix_str(
            f"{record['tokens_per_second']:,.0f} tok/s, loss {record['loss']:.4g}, lr {record['learning_rate']:.3g}",
            refresh=False,
        )
        self._progress.update(len(ready))

    @contextlib.contextmanager
    def paused(self, what: str = "other") -> Iterator[None]:
        """Time spent inside is counted as `what` ("eval", "checkpoint"), and not as step time."""
        started = time.perf_counter()
        yield
        seconds = time.perf_counter() - started
        self._since += seconds
        self._spent[what] += seconds

    def write_start(self, step: int) -> None:
        """Writes what starts here, and at the first start of a run the time from which goodput counts."""
        if self._writer:
            self._writer.write(start_record(step))
        if not step:
            self.write_time(0)

    def sync(self) -> None:
        """Makes all records so far durable."""
        if self._writer:
            self._writer.sync()

    def write_time(self, step: int, checkpoint: int = 0) -> None:
        """Writes where the wall time of the run has gone until now, and the newest step that is saved."""
        if self._writer:
            wall = self._wall_before + time.perf_counter() - self._began
            self._writer.write({"step": step, "checkpoint": checkpoint, **time_record(self._spent, wall)})

    def write_rollback(self, step: int, target: int) -> None:
        """Records that at `step` the run was rolled back to the parameters of step `target`."""
        if self._writer:
            self._writer.write({"step": step, "kind": "rollback", "to": target})
            logger.info("step %d: rolled back to the parameters of step %d", step, target)

    def _record_skip(self, step: int, metrics: dict[str, np.ndarray]) -> None:
        """Records that an update was skipped, with its documents, those of the largest loss first."""
        if not self._writer:
            return
        losses = metrics["row_loss"]
        suspects = np.argsort(-np.where(np.isfinite(losses), losses, np.inf), kind="stable")
        names = self._mixture.documents(step - 1, suspects)
        norm, limit = float(metrics["grad_norm"]), float(metrics["grad_norm_limit"])
        record = {"grad_norm": norm, "grad_norm_limit": limit, "in_a_row": metrics["skips_in_a_row"]}
        self._writer.write({"step": step, "kind": "skip", **record, "documents": names})
        reason = f"above {limit:.4g}" if limit and math.isfinite(norm) else "not finite"
        logger.info("step %d: update skipped, gradient norm %.4g is %s; %s", step, norm, reason, _some(names))

    def _record(self, step: int, metrics: dict[str, np.ndarray], seconds: float) -> dict[str, Any]:
        record = {"step": step, "kind": "train"}
        for key in ("loss", "learning_rate", "grad_norm", "param_norm", "update_norm"):
            record[key] = float(metrics[key])
        of_objective = {key: float(metrics[key]) for key in metrics if key.startswith("objective/")}
        record |= {key.removeprefix("objective/"): value for key, value in of_objective.items()}
        record["update_ratio"] = record["update_norm"] / max(record["param_norm"], 1e-30)
        record |= self.tokens
        record["tokens_per_second"] = float(metrics["source_tokens"].sum()) / max(seconds, 1e-9)
        record["seconds"] = seconds
        if metrics.get("grad_norm_limit", 0) > 0:
            record["grad_norm_limit"] = float(metrics["grad_norm_limit"])
        record |= _utilization(self._program, seconds)
        sums = zip(self._mixture.sources, metrics["source_loss"], metrics["source_weight"], strict=True)
        record |= {f"loss/{source.name}": float(loss / weight) for source, loss, weight in sums if weight > 0}
        return record

    def _check_finite(self, step: int, metrics: dict[str, np.ndarray]) -> None:
        if np.isfinite(metrics["loss"]) and np.isfinite(metrics["grad_norm"]):
            return
        # A gradient can overflow where every loss is finite: then all rows are suspects.
        is_bad = ~metrics["finite_rows"]
        names = self._mixture.documents(step - 1, np.flatnonzero(is_bad if is_bad.any() else ~is_bad))
        raise Diverged(
            f"step {step}: loss is {float(metrics['loss'])}, gradient norm {float(metrics['grad_norm'])}, in the batch"
            f" with {_some(names)}; stopped before any later checkpoint, the last good one is intact."
            " Look at those documents, or lower config.optimizer.learning_rate, in a new --workdir"
        )


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return f"documents {', '.join(names[:8])}{more}"


def _utilization(program: Program, seconds: float) -> dict[str, float | int]:
    """Throughput and MFU over all chips, and memory of the fullest device of this host; unknown values are left out.

    Tokens are those of a global batch, padding included: that is what is computed.
    """
    record: dict[str, float | int] = {}
    rows, length = program.batch["tokens"].shape
    speed, devices = rows * length / max(seconds, 1e-9), program.mesh.size
    if spec := chip(program.mesh.devices.flat[0].device_kind):
        record["tokens_per_second_per_chip"] = speed / math.ceil(devices / spec.devices)
        flops = train_flops_per_token(program.model, length, program.compute.frozen)
        record["mfu"] = mfu(speed, flops, devices * spec.flops_per_device)
    memory = [device.memory_stats() or {} for device in jax.local_devices()]
    for key, stat in (("hbm_bytes", "bytes_in_use"), ("hbm_peak_bytes", "peak_bytes_in_use")):
        if used := [stats[stat] for stats in memory if stat in stats]:
            record[key] = max(used)
    return record
