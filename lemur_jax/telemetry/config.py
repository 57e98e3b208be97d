"""`config.log`: how often metrics are written, and where to."""

import dataclasses

from lemur_jax.common.sections import require


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogConfig:
    """Metrics; always written to WORKDIR/metrics.jsonl."""

    every_steps: int = 10  # updates between two writes
    tensorboard: bool = False  # also write WORKDIR/tensorboard; needs the extra "tensorboard"
    wandb: bool = False  # also send to Weights & Biases, set up by WANDB_*; needs the extra "wandb"

    def __post_init__(self):
        require(self.every_steps >= 1, "log.every_steps", self.every_steps, "at least 1")
