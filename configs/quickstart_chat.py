"""Quickstart, stage 3: the vocabulary extended by ChatML's tokens, then chat tuning.

Data: conversations made of real functions, docstrings and documentation (`python_chat`), packed whole;
loss on the assistant's turns alone.
Hardware: 2 CPU cores, about 1 minute.

    lemur prepare --config configs/quickstart_chat.py
    lemur train --config configs/quickstart_chat.py --workdir quickstart/runs/chat
"""

from lemur_jax.config import default_config
from lemur_jax.models.presets import preset
from lemur_jax.text.chat_template import CHATML_TOKENS


def get_config():
    config = default_config(preset("quickstart", vocab_size=4000 + len(CHATML_TOKENS)))
    config.compute.dtype = "float32"
    config.compute.remat = "none"
    config.compute.loss_chunk = 64
    config.init.checkpoint = "quickstart/runs/lemur"
    config.init.new_rows = "mean"

    config.tokenizer.path = "quickstart/tokenizer_chat"
    config.tokenizer.extend = "quickstart/tokenizer"
    config.tokenizer.add_tokens = CHATML_TOKENS

    config.data.modules = ("quickstart_tasks",)
    config.data.stores = "quickstart/stores"
    config.data.sequence_length = 512
    config.data.sources = {"python_chat": {"share": 1.0, "packing": "fit", "max_epochs": 3.0}}

    config.train.steps = 150
    config.train.batch_rows = 8
    config.optimizer.learning_rate = 1e-3
    config.optimizer.final_learning_rate = 1e-4
    config.optimizer.warmup_steps = 10

    config.eval.tasks = ("python_stdlib", "python_docs", "python_chat")
    config.eval.groups = {"code": ("python_stdlib",), "text": ("python_docs",), "chat": ("python_chat",)}
    config.eval.max_rows = 200
    config.checkpoint.every_steps = 100
    config.log.every_steps = 10
    return config
