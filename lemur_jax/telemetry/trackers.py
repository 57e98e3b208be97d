"""Metrics for TensorBoard, through tensorboardX, and for Weights & Biases, through its own package.

A number of a record is named `kind/key`, or `kind/task/key` if the record names a task.
"""

import contextlib
import hashlib
import importlib.util
import os
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from typing import Any

from etils import epath

from lemur_jax.common.errors import UserError
from lemur_jax.common.paths import absolute
from lemur_jax.telemetry.config import LogConfig


def _scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """The finite numbers of a record but its step, by name."""
    prefix = "/".join(str(record[key]) for key in ("kind", "task") if key in record)
    return {
        f"{prefix}/{key}": value
        for key, value in record.items()
        if key != "step" and isinstance(value, int | float)
    }


def check_trackers(log: LogConfig) -> None:
    """Raises UserError where a tracker is on and its package is missing, or W&B has no API key."""
    for option, package in (("tensorboard", "tensorboardX"), ("wandb", "wandb")):
        if getattr(log, option) and not importlib.util.find_spec(package):
            raise UserError(
                f"config.log.{option} needs {package}: pip install 'lemur_jax[{option}]', or set it to False"
            )
    if log.wandb:
        import wandb

        with _starting():
            wandb.setup(wandb.Settings(silent=True))
            wandb.login(verify=False)  # asks for a key at a terminal; nothing to do offline


@contextlib.contextmanager
def _starting() -> Iterator[None]:
    """Turns errors of W&B into a UserError."""
    import wandb

    try:
        yield
    except (wandb.Error, OSError, ValueError) as error:
        raise UserError(
            f"config.log.wandb: W&B does not start ({error}); set WANDB_API_KEY, or WANDB_MODE=offline"
        ) from error


class TensorBoard:
    """Writes records as scalars below `WORKDIR/tensorboard`; TensorFlow is not needed.

    TensorBoard hides what earlier processes wrote of steps after `step`, where the run starts or resumes.
    """

    def __init__(self, workdir: epath.PathLike, step: int):
        directory = os.fspath(epath.Path(workdir) / "tensorboard")
        # Files are named by the second and the host: two starts within one second would overwrite each other.
        suffix = f".{step:09d}"
        from tensorboardX import SummaryWriter

        options = {"purge_step": step + 1, "flush_secs": 30, "filename_suffix": suffix}
        try:
            self._writer = SummaryWriter(directory, **options)
        except ImportError as error:
            raise UserError(
                f"config.log.tensorboard on gs:// needs google-cloud-storage ({error}): install it, or set it to False"
            ) from error

    def write(self, record: Mapping[str, Any]) -> None:
        for name, value in _scalars(record).items():
            self._writer.add_scalar(name, value, record["step"])

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """Sends records to one W&B run, named after the workdir; `WANDB_*` set project, account, and another name or id.

    A resumed run continues the same W&B run; repeated steps are sent again. A `fresh` run gets a new one, even if the
    workdir had a run before, and so does a copy of the workdir.
    """

    def __init__(self, workdir: epath.PathLike, fresh: bool):
        import wandb

        path, id_file = os.fspath(absolute(workdir)), epath.Path(workdir) / "wandb-id.txt"
        if fresh:
            id_file.write_text(uuid.uuid4().hex)
        # The file is missing in runs of earlier versions.
        identity = path + (id_file.read_text() if id_file.exists() else "")
        with _starting():
            self._run = wandb.init(
                dir=tempfile.mkdtemp(prefix="wandb-") if "://" in path else path,
                id=os.environ.get("WANDB_RUN_ID") or hashlib.sha256(identity.encode()).hexdigest()[:16],
                name=os.environ.get("WANDB_NAME") or os.path.basename(path),
                resume="allow",
                settings=wandb.Settings(console="off", silent=True),
            )
        self._run.define_metric("*", step_metric="step")

    def write(self, record: Mapping[str, Any]) -> None:
        self._run.log({**_scalars(record), "step": record["step"]})

    def flush(self) -> None:
        """Nothing: W&B's own process writes at once."""

    def close(self) -> None:
        self._run.finish()
