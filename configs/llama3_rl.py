"""Reinforcement learning of Llama-3.1-Instruct (8B, or 70B with `:70b`) on MINT's tasks, on one slice.

512 episodes an update, 8 of each task, of 2048 tokens. Never run; docs/planner.md has an estimate.

    lemur plan --mode rl --config configs/llama3_rl.py --topology v5e-64 --prompt-length 512
    lemur plan --mode rl --config configs/llama3_rl.py:70b --topology v5p-128 --prompt-length 512
    lemur rl --config configs/llama3_rl.py --workdir gs://BUCKET/runs/llama3_rl
"""

from lemur_jax.config import default_config
from lemur_jax.models.presets import preset


def get_config(arg: str = "8b"):
    if arg not in ("8b", "70b"):
        raise ValueError(f"unknown size {arg!r}: write :8b or :70b")
    config = default_config(preset(f"llama3.1_{arg}").to_dict())
    config.init.checkpoint = f"hf/Llama-3.1-{arg.upper()}-Instruct"
    config.tokenizer.path = config.init.checkpoint

    config.rl.environment = "mint"
    config.rl.data = "data"
    config.rl.group_size = 8
    config.rl.max_turns = 3
    config.rl.max_new_tokens = 512
    config.rl.algorithm = "dapo"
    config.rl.clip_high = 0.28
    config.rl.max_rounds = 2

    config.mesh.fsdp = -1
    config.mesh.tensor = 8
    config.data.sequence_length = 2048
    config.train.batch_rows = 512
    config.train.microbatches = 8
    config.train.steps = 200
    config.compute.loss_chunk = 256
    config.optimizer.learning_rate = 1e-6
    config.optimizer.final_learning_rate = 1e-6
    config.optimizer.warmup_steps = 5
    config.optimizer.weight_decay = 0.0
    config.checkpoint.every_steps = 20
    return config
