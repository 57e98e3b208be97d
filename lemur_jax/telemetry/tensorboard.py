"""Metrics for TensorBoard, through tensorboardX: no TensorFlow is needed to write them."""

import os
from collections.abc import Mapping
from typing import Any

from etils import epath

from lemur_jax.common.errors import UserError

DIRECTORY = "tensorboard"


class TensorBoard:
    """Writes records of `metrics.jsonl` as scalars below `WORKDIR/tensorboard`.

    A scalar is named `kind/key`, or `kind/task/key` where a record names a task.

    Args:
      workdir: of the run; local, or gs:// where `google-cloud-storage` is installed.
      step: the run starts or resumes here; TensorBoard hides what earlier processes wrote of later steps.

    Raises:
      UserError: tensorboardX is not installed.
    """

    def __init__(self, workdir: epath.PathLike, step: int):
        try:
            from tensorboardX import SummaryWriter
        except ImportError as error:
            raise UserError(
                "config.log.tensorboard needs tensorboardX: pip install 'lemur_jax[tensorboard]', or set it to False"
            ) from error
        directory = os.fspath(epath.Path(workdir) / DIRECTORY)
        # Files are named by the second and the host: two starts within one would overwrite each other.
        suffix = f".{step:09d}"
        self._writer = SummaryWriter(directory, purge_step=step + 1, flush_secs=30, filename_suffix=suffix)

    def write(self, record: Mapping[str, Any]) -> None:
        """Takes the numbers of a record; its step and what is no finite number are left out."""
        prefix = "/".join(str(record[key]) for key in ("kind", "task") if key in record)
        for key, value in record.items():
            if key != "step" and isinstance(value, int | float):
                self._writer.add_scalar(f"{prefix}/{key}", value, record["step"])

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()
