"""Quickstart from scratch, base: a small Llama trained on text, in place of Llama-2.

Data: Python's documentation (task `python_docs`, see `configs/quickstart_tasks.py`).
Hardware: 2 CPU cores, about 2 minutes.

    lemur prepare --config configs/quickstart_base.py
    lemur train --config configs/quickstart_base.py --workdir quickstart/runs/base
"""

from lemur_jax.config import default_config
from lemur_jax.models.presets import preset


def get_config():
    config = default_config(preset("quickstart"))
    config.compute.dtype = "float32"  # a CPU gains nothing from bfloat16
    config.compute.remat = "none"
    config.compute.loss_chunk = 64

    config.tokenizer.path = "quickstart/tokenizer"
    config.tokenizer.train_vocab_size = 4000
    config.tokenizer.train_tasks = ("python_stdlib", "python_docs")

    config.data.modules = ("quickstart_tasks",)
    config.data.stores = "quickstart/stores"
    config.data.sequence_length = 256
    config.data.sources = {"python_docs": {"share": 1.0, "packing": "concat", "max_epochs": 8.0}}

    config.train.steps = 400
    config.train.batch_rows = 16
    config.optimizer.learning_rate = 3e-3
    config.optimizer.final_learning_rate = 3e-4
    config.optimizer.warmup_steps = 40

    config.eval.tasks = ("python_stdlib", "python_docs")
    config.eval.every_steps = 200
    config.eval.max_rows = 400
    config.checkpoint.every_steps = 200
    config.log.every_steps = 20
    return config
