"""`config.rl`: what `lemur rl` plays, and how rewards become an update."""

import dataclasses

from lemur_jax.common.sections import require, require_one_of

ALGORITHMS = ("grpo", "dr_grpo", "dapo", "rloo")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RlConfig:
    """Episodes and rewards. Each episode is a row: `train.batch_rows` = number of groups × `group_size`."""

    environment: str = ""  # "lamp", "calculator", "verifiers:TASKSET", or one of `lemur eval --agents`
    data: str = "."  # directory of the data of MINT or InterCode
    group_size: int = 8  # episodes of a task
    max_turns: int = 4  # of an episode, where the environment has no limit of its own
    max_new_tokens: int = 64  # of a turn
    algorithm: str = "grpo"  # advantages and averaging: "grpo", "dr_grpo", "dapo" or "rloo"
    rewards: str = "episode"  # "episode": sum for all tokens; "turn": those from each turn on
    importance: str = "token"  # ratio by "token"; "sequence": geometric mean over tokens
    clip_low: float = 0.2  # the importance ratio is clipped at 1 - this
    clip_high: float = 0.2  # and at 1 + this; DAPO: 0.28
    kl: float = 0.0  # weight of the KL divergence from the initial parameters
    off_policy: bool = False  # sample for the next update while this one runs, with the parameters before it
    max_rounds: int = 1  # maximum rounds of sampling; above 1, new tasks replace groups with equal rewards
    mask_truncated: bool = False  # do not train on episodes truncated at `data.sequence_length`
    max_logprob_gap: float = 0.05  # stop above this mean |difference| of log-probabilities, nats a token
    environment_seconds: float = 60.0  # a call that takes longer makes its episode void
    eval_every_steps: int = 20  # updates between two greedy evaluations on held-out tasks; 0: never
    eval_tasks: int = 64  # maximum number of these tasks
    shuffle_rewards: bool = False  # negative control: rewards are permuted over the batch

    def __post_init__(self):
        require_one_of("rl.algorithm", self.algorithm, ALGORITHMS)
        require_one_of("rl.rewards", self.rewards, ("episode", "turn"))
        require_one_of("rl.importance", self.importance, ("token", "sequence"))
        require(self.group_size >= 2, "rl.group_size", self.group_size, "at least 2")
        for key in ("max_turns", "max_new_tokens", "max_rounds", "eval_tasks"):
            require(getattr(self, key) >= 1, f"rl.{key}", getattr(self, key), "at least 1")
        for key in ("clip_low", "clip_high", "max_logprob_gap", "environment_seconds"):
            require(getattr(self, key) > 0, f"rl.{key}", getattr(self, key), "above 0")
        for key in ("kl", "eval_every_steps"):
            require(getattr(self, key) >= 0, f"rl.{key}", getattr(self, key), "0 or more")

    def check_rows(self, rows: int) -> None:
        """Raises UserError if `train.batch_rows` is not a whole number of groups."""
        rule = f"a multiple of config.rl.group_size {self.group_size}"
        require(rows % self.group_size == 0, "train.batch_rows", rows, rule)
