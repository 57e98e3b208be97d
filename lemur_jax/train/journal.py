"""What is on record of a run when a process begins, and where it goes on."""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence

from etils import epath

from lemur_jax.telemetry.config import LogConfig
from lemur_jax.telemetry.goodput import earlier_time
from lemur_jax.telemetry.metrics import MetricsWriter, Record, read_metrics


@dataclasses.dataclass(frozen=True, kw_only=True)
class Journal:
    """Kept by host 0; that of any other host is empty, and has no writer.

    Attributes:
      writer: of new records.
      records: of earlier processes, up to the step from which the run goes on.
      spent: seconds that went to what in them, see `telemetry.goodput.earlier_time`.
    """

    writer: MetricsWriter | None = None
    records: Sequence[Record] = ()
    spent: Mapping[str, float] = dataclasses.field(default_factory=dict)

    @property
    def last_train_record(self) -> Record:
        """Of the last step that counts; empty where there is none."""
        trained = [record for record in self.records if record.get("kind") == "train"]
        return trained[-1] if trained else {}


@contextlib.contextmanager
def open_journal(log: LogConfig, workdir: epath.Path, step: int, started: float) -> Iterator[Journal]:
    """Of host 0, whose new records follow the old ones.

    What earlier processes wrote of later steps is forgotten: they are made again.

    Args:
      log: `config.log`.
      workdir: of the run.
      step: that it goes on from. What was scored at step 0 is scored again.
      started: when this process began, seconds since 1970.
    """
    spent = earlier_time(workdir, step, started)
    with MetricsWriter(workdir, tensorboard=log.tensorboard, wandb=log.wandb) as writer:
        writer.truncate_after(step or -1)
        yield Journal(writer=writer, records=read_metrics(workdir), spent=spent)
