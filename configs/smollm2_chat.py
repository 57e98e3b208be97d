"""Quickstart, stage 5: chat tuning after `smollm2_lemur.py`, in SmolLM2's own chat template.

Data: conversations made of real functions, docstrings and documentation (`python_chat`), packed whole; loss on the
assistant's turns only.
Hardware: 2 CPU cores, about 2 minutes with the evaluations; 5 GB of memory.

    lemur prepare --config configs/smollm2_chat.py
    lemur train --config configs/smollm2_chat.py --workdir quickstart/smollm2/chat
"""

import smollm2_lemur


def get_config():
    config = smollm2_lemur.get_config()
    config.init.checkpoint = "quickstart/smollm2/lemur"
    config.data.sources = {"python_chat": {"share": 1.0, "packing": "fit", "max_epochs": 1.0}}

    config.train.steps = 10
    config.optimizer.learning_rate = 5e-5
    config.optimizer.final_learning_rate = 5e-6
    config.optimizer.warmup_steps = 1

    config.eval.tasks = ("python_stdlib", "python_docs", "python_chat")
    config.eval.groups = {"code": ("python_stdlib",), "text": ("python_docs",), "chat": ("python_chat",)}
    config.checkpoint.every_steps = 10
    return config
