"""Quickstart from scratch, RL: a text game, starting from imitation of a careless player.

`:play` tunes the chat model on conversations of a careless player (task `lamp_play`), who goes north half of the time
and otherwise follows the light; without an argument, `lemur rl` continues from that model (docs/rl.md).
Hardware: 2 CPU cores, two minutes each.

    lemur prepare --config configs/quickstart_rl.py:play
    lemur train --config configs/quickstart_rl.py:play --workdir quickstart/runs/play
    lemur rl --config configs/quickstart_rl.py --workdir quickstart/runs/rl
"""

from lemur_jax.config import default_config
from lemur_jax.models.presets import preset
from lemur_jax.text.chat_template import CHATML_TOKENS


def get_config(arg: str = ""):
    config = default_config(preset("quickstart", vocab_size=4000 + len(CHATML_TOKENS)))
    config.compute.dtype = "float32"
    config.compute.remat = "none"
    config.tokenizer.path = "quickstart/tokenizer_chat"
    config.data.modules = ("quickstart_tasks",)
    config.data.stores = "quickstart/stores"
    config.data.sequence_length = 96
    config.log.every_steps = 5
    config.checkpoint.every_steps = 50
    if arg == "play":
        config.init.checkpoint = "quickstart/runs/chat"
        config.data.sequence_length = 128
        config.data.sources = {"lamp_play": {"share": 1.0, "packing": "fit", "max_epochs": 8.0}}
        config.train.steps = 240
        config.train.batch_rows = 16
        config.optimizer.learning_rate = 1e-3
        config.optimizer.warmup_steps = 5
        return config
    if arg:
        raise ValueError(f"unknown variant {arg!r}: write :play, or nothing")
    config.init.checkpoint = "quickstart/runs/play"
    config.rl.environment = "lamp"
    config.rl.group_size = 8
    config.rl.max_new_tokens = 4
    config.rl.algorithm = "grpo"
    config.rl.rewards = "turn"
    config.rl.eval_every_steps = 10
    config.train.steps = 30
    config.train.batch_rows = 64
    config.optimizer.learning_rate = 5e-4
    config.optimizer.final_learning_rate = 5e-4
    config.optimizer.weight_decay = 0.0
    return config
