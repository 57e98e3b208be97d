"""`config.checkpoint`: when a run saves, and what it keeps."""

import dataclasses

from lemur_jax.common.sections import require, require_one_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Checkpoints of a run; the last step is always saved."""

    every_steps: int = 500  # save every this many updates; 0: only by the other options
    every_minutes: float = 0.0  # also save after this many minutes (checked every log.every_steps); 0: never
    keep: int = 3  # number of newest checkpoints to keep
    keep_every: int = 0  # also keep steps that are multiples of this; 0: none
    keep_best: str = ""  # also keep the one with the lowest held-out loss on this task of eval.tasks
    grace_s: float = 0.0  # seconds for a save after SIGTERM before the process ends; 0: no limit
    max_failures: int = 3  # consecutive failed saves on one host before the run stops
    other_optimizer: str = "refuse"  # "fresh": reset the optimizer state if the stored one does not match
    broadcast: bool = False  # with mesh.data > 1: one slice reads a checkpoint and sends it to the others

    def __post_init__(self):
        for key in ("keep", "max_failures"):
            require(getattr(self, key) >= 1, f"checkpoint.{key}", getattr(self, key), "at least 1")
        for key in ("every_steps", "every_minutes", "keep_every", "grace_s"):
            require(getattr(self, key) >= 0, f"checkpoint.{key}", getattr(self, key), "0 or more")
        compared = "above 0 with checkpoint.keep_best, which compares the checkpoints of these steps"
        require(
            not self.keep_best or self.every_steps > 0, "checkpoint.every_steps", self.every_steps, compared
        )
        require_one_of("checkpoint.other_optimizer", self.other_optimizer, ("refuse", "fresh"))
