"""The sections of training: updates, optimizer, spikes, first parameters, held-out evaluation."""

import dataclasses
from collections.abc import Mapping

from lemur_jax.common.sections import require, require_one_of

OPTIMIZER_NAMES = ("adamw", "adafactor", "muon")
NOT_ADDITIVE = ("orpo", "kto")  # preference losses with a term that is no sum over the batch


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How many updates, and how large."""

    steps: int = 1000  # updates
    batch_rows: int = 128  # rows B of one update, over all hosts and microbatches
    microbatches: int = 1  # parts of B that are computed sequentially (gradient accumulation)
    batch_documents: int = 0  # above 0: mean documents (conversations) of an update; sets `batch_rows`

    def __post_init__(self):
        for key in ("steps", "batch_rows", "microbatches"):
            require(getattr(self, key) >= 1, f"train.{key}", getattr(self, key), "at least 1")
        require(self.batch_rows <= 2**20, "train.batch_rows", self.batch_rows, "at most 2^20")
        require(self.batch_documents >= 0, "train.batch_documents", self.batch_documents, "0 (off) or more")

    @property
    def microbatch_rows(self) -> int:
        return self.batch_rows // self.microbatches


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Clipping, direction, decoupled weight decay, and a learning rate with warmup and cosine."""

    name: str = "adamw"  # "adamw", "adafactor" or "muon"
    learning_rate: float = 3e-4  # peak, at the end of the warmup
    final_learning_rate: float = 3e-5  # end of the cosine, after the last update
    warmup_steps: int = 0  # updates of linear warmup from 0
    b1: float = 0.9  # decay of first moments
    b2: float = 0.95  # decay of second moments
    eps: float = 1e-8  # added to the square root of second moments
    weight_decay: float = 0.1  # for matrices only, not for norm scales
    clip_norm: float = 1.0  # maximum global gradient norm; 0: off
    moments_dtype: str = "float32"  # dtype of first moments
    z_loss: float = 0.0  # weight of log(Z)^2
    router_balance_loss: float = 0.01  # weight of the routers' load-balancing loss, `models/experts.py`
    router_z_loss: float = 0.001  # weight of the routers' own log(Z)^2

    def __post_init__(self):
        require_one_of("optimizer.name", self.name, OPTIMIZER_NAMES)
        require(self.learning_rate > 0, "optimizer.learning_rate", self.learning_rate, "positive")
        sizes = ("final_learning_rate", "warmup_steps", "eps", "weight_decay", "clip_norm", "z_loss")
        for key in (*sizes, "router_balance_loss", "router_z_loss"):
            require(getattr(self, key) >= 0, f"optimizer.{key}", getattr(self, key), "0 or more")
        for key in ("b1", "b2"):
            require(0 <= getattr(self, key) < 1, f"optimizer.{key}", getattr(self, key), "in [0, 1)")
        require_one_of("optimizer.moments_dtype", self.moments_dtype, ("float32", "bfloat16"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreferenceConfig:
    """A loss on chosen and rejected conversations, see train/preferences.py."""

    loss: str = ""  # "dpo", "ipo", "simpo", "orpo" or "kto"; "": next-token loss
    beta: float = 0.1  # strength of the reference term; SimPO, ORPO: scale of the loss's argument
    label_smoothing: float = 0.0  # DPO, SimPO: probability that a pair's labels are swapped
    margin: float = 0.5  # SimPO's γ
    desirable_weight: float = 1.0  # of KTO
    undesirable_weight: float = 1.0  # of KTO

    def __post_init__(self):
        require_one_of("preference.loss", self.loss, ("", "dpo", "ipo", "simpo", "orpo", "kto"))
        require(self.beta > 0, "preference.beta", self.beta, "positive")
        smoothing = self.label_smoothing
        require(0 <= smoothing < 0.5, "preference.label_smoothing", smoothing, "in [0, 0.5)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpikesConfig:
    """Updates that are skipped by rule, see train/spikes.py. Off: a gradient that is not finite stops the run."""

    factor: float = 0.0  # above 0: skip gradients of a norm above factor × running median, or not finite
    window: int = 100  # accepted norms in the median; until then only norms that are not finite are skipped
    rollback_after: int = 0  # consecutive skips before a rollback to the last regular checkpoint; 0: never
    max_rollbacks: int = 3  # rollbacks after which the run stops instead

    def __post_init__(self):
        require(self.factor == 0 or self.factor > 1, "spikes.factor", self.factor, "above 1, or 0 for off")
        require(self.window >= 1, "spikes.window", self.window, "at least 1")
        for key in ("rollback_after", "max_rollbacks"):
            require(getattr(self, key) >= 0, f"spikes.{key}", getattr(self, key), "0 or more")
        must = "0 without spikes.factor, as nothing is skipped"
        require(self.factor or not self.rollback_after, "spikes.rollback_after", self.rollback_after, must)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """A loss against a teacher's distributions, see train/distill.py."""

    teacher: str = ""  # checkpoint or Hugging Face directory of the teacher; "": no distillation
    top_k: int = 64  # tokens of the teacher's distribution; all others are one outcome
    weight: float = 1.0  # weight w of the divergence; 1 - w is that of the targets' cross-entropy
    reverse: bool = False  # KL(student ‖ teacher) instead of KL(teacher ‖ student)

    def __post_init__(self):
        require(self.top_k >= 1, "distill.top_k", self.top_k, "at least 1")
        require(0 < self.weight <= 1, "distill.weight", self.weight, "above 0 and at most 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class InitConfig:
    """Where the parameters come from; with the defaults fresh ones from `config.seed`."""

    checkpoint: str = ""  # checkpoint or Hugging Face directory; only its parameters are loaded
    drop_rows_above: int = 0  # above 0: drop vocabulary rows from this id on, before extending
    new_rows: str = "refuse"  # "mean": initialize added vocabulary rows with the mean of the others
    change_rope: bool = False  # whether model.rope_* may differ from the checkpoint's, e.g. for longer rows

    def __post_init__(self):
        require(self.drop_rows_above >= 0, "init.drop_rows_above", self.drop_rows_above, "0 or more")
        require_one_of("init.new_rows", self.new_rows, ("refuse", "mean"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Held-out loss of each task, over its validation store."""

    every_steps: int = 0  # evaluate every this many updates and at the end; 0: only at the end
    tasks: tuple[str, ...] = ()  # tasks whose validation stores are scored separately
    batch_rows: int = 0  # rows of a batch; 0: those of a training microbatch
    max_rows: int = 0  # rows scored of each task, chosen by a fixed permutation; 0: all
    groups: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)  # {"code": ("c", "java")}

    def __post_init__(self):
        for key in ("every_steps", "batch_rows", "max_rows"):
            require(getattr(self, key) >= 0, f"eval.{key}", getattr(self, key), "0 or more")
        require(len(set(self.tasks)) == len(self.tasks), "eval.tasks", self.tasks, "each task once")
        for name, members in self.groups.items():
            valid = members and set(members) <= set(self.tasks)
            require(
                bool(valid), f"eval.groups.{name}", members, f"one or more of config.eval.tasks {self.tasks}"
            )

    @property
    def task_groups(self) -> Mapping[str, tuple[str, ...]]:
        """`groups`, which the balance score weighs alike; without any, each task is a group of its own."""
        return self.groups or {task: (task,) for task in self.tasks}
