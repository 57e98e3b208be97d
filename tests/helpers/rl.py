"""Small runs of `lemur rl`, and an environment whose rewards differ although the policy knows nothing."""

from lemur_jax.agents.environments import Environment, Step
from lemur_jax.config import default_config
from lemur_jax.models.presets import preset

STEPS = 4


class Echo(Environment):
    """Rewards by the length of an answer, which differs from episode to episode; never solved."""

    id = "echo/0"

    def reset(self):
        return "say"

    def step(self, action):
        return Step(observation=f"no {len(action)}", verdict="wrong answer", reward=min(len(action), 9) / 10)


def only_echo(name: str = "", data: str = "") -> tuple[list[Environment], list[Environment]]:
    """In place of `games.tasks`."""
    return [Echo()], [Echo()]


def make_config(tokenizer, path, **options):
    """A tiny model with 64 positions; groups of 4 in 2 rows at a time."""
    for name, content in tokenizer.files().items():
        (path / "tokenizer").mkdir(exist_ok=True)
        (path / "tokenizer" / name).write_bytes(content)
    config = default_config(preset("tiny", vocab_size=tokenizer.vocab_size))
    config.compute.dtype = "float32"
    config.tokenizer.path = str(path / "tokenizer")
    config.data.sequence_length = 64
    config.train.steps, config.train.batch_rows = STEPS, 8
    config.optimizer.learning_rate = 1e-2
    config.checkpoint.every_steps = 1
    config.log.every_steps = 1
    config.rl.update(
        {"environment": "echo", "group_size": 4, "max_new_tokens": 3, "max_turns": 2, "eval_tasks": 2}
    )
    for key, value in options.items():
        section, _, name = key.rpartition(".")
        config[section or "rl"][name] = value
    return config
