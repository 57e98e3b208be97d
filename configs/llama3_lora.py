"""LoRA of Llama-3.1 (8B, or 70B with `:70b`) on conversations, with an int8 base.

70B fits a v5e-16 and 8B one chip of 16 GiB (`lemur plan`, docs/adapters.md). Rank 16 on all projections,
alpha 32, a constant batch of 16 rows; the learning rate is ten times that of tuning all parameters.
Needs `pip install '.[int8]'`.

    lemur plan --config configs/llama3_lora.py --topology v5e-1
    lemur plan --config configs/llama3_lora.py:70b --topology v5e-16
    lemur train --config configs/llama3_lora.py --workdir gs://BUCKET/runs/llama3_lora
"""

from lemur_jax.config import default_config
from lemur_jax.models.presets import preset


def get_config(arg: str = "8b"):
    if arg not in ("8b", "70b"):
        raise ValueError(f"unknown size {arg!r}: write :8b or :70b")
    config = default_config(preset(f"llama3.1_{arg}").to_dict())
    config.init.checkpoint = f"hf/Llama-3.1-{arg.upper()}"
    config.tokenizer.path = config.init.checkpoint

    config.adapter.rank = 16
    config.adapter.alpha = 32.0
    config.adapter.base_dtype = "int8"

    config.data.modules = ("lemur_tasks",)
    config.data.sequence_length = 2048
    config.data.sources = {"openorca": {"share": 1.0, "packing": "fit"}}

    config.mesh.fsdp = -1
    config.train.steps = 1000
    config.train.batch_rows = 16
    config.train.microbatches = 16 if arg == "8b" else 1
    config.compute.loss_chunk = 256
    config.optimizer.learning_rate = 2e-4
    config.optimizer.final_learning_rate = 2e-5
    config.optimizer.warmup_steps = 30
    config.optimizer.weight_decay = 0.0
    config.checkpoint.every_steps = 200
    return config
