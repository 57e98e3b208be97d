"""The records of a run when a process starts: what earlier processes wrote, and the writer that continues."""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from etils import epath

from lemur_jax.cluster.hosts import inform, is_primary
from lemur_jax.common.errors import UserError
from lemur_jax.telemetry.config import LogConfig
from lemur_jax.telemetry.goodput import earlier_time
from lemur_jax.telemetry.metrics import METRICS_FILE, MetricsWriter, Record, read_metrics


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunHistory:
    """Metrics of a run; only the primary host has records and a writer."""

    writer: MetricsWriter | None = None  # appends new records; None on the other hosts
    records: Sequence[Record] = ()  # of earlier processes, up to the step from which the run continues
    # Seconds of earlier processes by what they were spent on, see `telemetry.goodput.earlier_time`.
    spent: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def write_changes(self, step: int, changes: Mapping[str, tuple[Any, Any]]) -> None:
        """Records and logs that the config changed from a step on: key -> (old value, new value)."""
        if self.writer and changes:
            listed = [f"{key}: {old!r} -> {new!r}" for key, (old, new) in changes.items()]
            self.writer.write({"step": step, "kind": "extension", "changes": listed})
            inform(f"changed from step {step} on: {'; '.join(listed)}")


@contextlib.contextmanager
def open_history(log: LogConfig, workdir: epath.Path, step: int, started: float) -> Iterator[RunHistory]:
    """Opens the metrics of a run that continues from `step`; records of later steps are removed and made again.

    Evaluations of step 0 are repeated. `started` is when this process started, seconds since 1970. UserError: the run
    has saved checkpoints, and none is left.
    """
    if not is_primary():
        yield RunHistory()
        return
    spent = earlier_time(workdir, step, started)
    with MetricsWriter(workdir, tensorboard=log.tensorboard, wandb=log.wandb) as writer:
        earlier = read_metrics(workdir) if not step else []
        saved = max(
            (record.get("checkpoint", 0) for record in earlier if record.get("kind") == "time"), default=0
        )
        if saved:
            raise UserError(
                f"there is no checkpoint in {workdir}/checkpoints, but {METRICS_FILE} says that step {saved} was"
                f" saved: put them back, or remove {METRICS_FILE} to begin again at step 0"
            )
        writer.truncate_after(step or -1)
        yield RunHistory(writer=writer, records=read_metrics(workdir), spent=spent)
