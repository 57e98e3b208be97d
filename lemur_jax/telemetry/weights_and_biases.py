"""Metrics for Weights & Biases, through its own package; `WANDB_MODE=offline` writes them to a directory alone."""

import hashlib
import os
import tempfile
from collections.abc import Mapping
from typing import Any

from etils import epath

from lemur_jax.common.errors import UserError


class WeightsAndBiases:
    """Sends records of `metrics.jsonl` to one run, named after the workdir; project and account by `WANDB_*`.

    A record's numbers are named as in TensorBoard: `kind/key`, or `kind/task/key`, over `step`. What a run
    repeats after a kill is sent again and lies on the same steps.

    Args:
      workdir: of the run; its path makes the run's id, so that a resumed run is the same one. Local files of
        W&B go to `workdir/wandb`, or to a temporary directory where the workdir is an object store.

    Raises:
      UserError: wandb is not installed, or refuses to start.
    """

    def __init__(self, workdir: epath.PathLike):
        try:
            import wandb
        except ImportError as error:
            raise UserError(
                "config.log.wandb needs wandb: pip install 'lemur_jax[wandb]', or set it to False"
            ) from error
        path = os.fspath(epath.Path(workdir))
        local = path if "://" not in path else tempfile.mkdtemp(prefix="wandb-")
        try:
            self._run = wandb.init(
                dir=local,
                id=hashlib.sha256(os.path.abspath(path).encode()).hexdigest()[:16],
                name=os.path.basename(path),
                resume="allow",
                settings=wandb.Settings(console="off", silent=True),
            )
        except (wandb.Error, OSError) as error:
            raise UserError(
                f"config.log.wandb: W&B does not start ({error}); set WANDB_API_KEY, or WANDB_MODE=offline"
            ) from error
        self._run.define_metric("*", step_metric="step")

    def write(self, record: Mapping[str, Any]) -> None:
        """Takes the numbers of a record; what is no finite number is left out."""
        prefix = "/".join(str(record[key]) for key in ("kind", "task") if key in record)
        numbers = {
            f"{prefix}/{key}": value for key, value in record.items() if isinstance(value, int | float)
        }
        numbers.pop(f"{prefix}/step", None)
        self._run.log({**numbers, "step": record["step"]})

    def flush(self) -> None:
        """Nothing: W&B's own process writes at once."""

    def close(self) -> None:
        self._run.finish()
