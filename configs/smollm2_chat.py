"""Quickstart, stage 5: chat tuning after `smollm2_lemur.py`, in SmolLM2's own chat template.

Data: conversations made of real functions, docstrings and documentation (`python_chat`), packed whole; loss on the
assistant's turns alone.
Hardware: 2 CPU cores, about 2 minutes with the evaluations; 5 GB of memory.

    lemur prepare --config configs/smollm2_chat.py
    lemur train --config configs/smollm2_chat.py --workdir quickstart/smollm2/chat
"""

from lemur_jax import config_from_checkpoint


def get_config():
    config = config_from_checkpoint("quickstart/smollm2/base")
    config.init.checkpoint = "quickstart/smollm2/lemur"
    config.compute.dtype = "float32"
    config.compute.remat = "none"
    config.compute.loss_chunk = 128

    config.data.modules = ("quickstart_tasks",)
    config.data.stores = "quickstart/smollm2/stores"
    config.data.sequence_length = 512
    config.data.sources = {"python_chat": {"share": 1.0, "packing": "fit", "max_epochs": 1.0}}

    config.train.steps = 10
    config.train.batch_rows = 2
    config.optimizer.learning_rate = 5e-5
    config.optimizer.final_learning_rate = 5e-6
    config.optimizer.warmup_steps = 1

    config.eval.tasks = ("python_stdlib", "python_docs", "python_chat")
    config.eval.groups = {"code": ("python_stdlib",), "text": ("python_docs",), "chat": ("python_chat",)}
    config.eval.max_rows = 8
    config.checkpoint.every_steps = 10
    config.checkpoint.keep = 1
    config.log.every_steps = 2
    return config
