"""Quickstart from scratch, chat: ChatML's tokens added to the vocabulary, then chat tuning.

Data: conversations made of real functions, docstrings and documentation (`python_chat`), packed whole;
loss on the assistant's turns only.
Hardware: 2 CPU cores, about 1 minute.

    lemur prepare --config configs/quickstart_chat.py
    lemur train --config configs/quickstart_chat.py --workdir quickstart/runs/chat
"""

import quickstart_lemur

from lemur_jax.text.chat_template import CHATML_TOKENS


def get_config():
    config = quickstart_lemur.get_config()
    config.model.vocab_size += len(CHATML_TOKENS)
    config.init.checkpoint = "quickstart/runs/lemur"
    config.init.new_rows = "mean"

    config.tokenizer.path = "quickstart/tokenizer_chat"
    config.tokenizer.extend = "quickstart/tokenizer"
    config.tokenizer.add_tokens = CHATML_TOKENS

    config.data.sequence_length = 512
    config.data.sources = {"python_chat": {"share": 1.0, "packing": "fit", "max_epochs": 3.0}}

    config.train.steps = 150
    config.train.batch_rows = 8
    config.optimizer.warmup_steps = 10

    config.eval.tasks = ("python_stdlib", "python_docs", "python_chat")
    config.eval.groups = {"code": ("python_stdlib",), "text": ("python_docs",), "chat": ("python_chat",)}
    config.eval.every_steps = 0
    config.eval.max_rows = 200
    config.checkpoint.every_steps = 100
    config.log.every_steps = 10
    return config
