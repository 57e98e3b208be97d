"""Lemur-70B-Chat: Lemur-70B tuned on 300K text and code conversations in ChatML (Xu et al., ICLR 2024).

Published: ChatML, loss on the assistant's turns alone, about 300K conversations (OpenAssistant 1, OpenOrca,
ShareGPT and ChatLogs, Evol-CodeAlpaca), vocabulary 32,005. The base model's ids from 32,000 on mean other
tokens and are forgotten first. Not published, chosen here: two epochs at 2e-5 to 2e-6, 256 rows of 4096.
Expected: the "Lemur-70B-Chat" row of the paper (MMLU 65.3, GSM8K 66.3, HumanEval 61.0, MBPP 55.5).
Hardware: TPU v4-512 (256 chips), or any slice that `lemur plan` says fits.

    export LEMUR_DATA=gs://BUCKET/data                      # see configs/lemur_tasks.py
    lemur prepare --config configs/lemur_70b_chat.py
    lemur train --config configs/lemur_70b_chat.py --workdir gs://BUCKET/runs/lemur_70b_chat
    lemur export-hf gs://BUCKET/runs/lemur_70b_chat lemur-70b-chat
"""

from lemur_jax.config import default_config
from lemur_jax.models.presets import preset
from lemur_jax.text.chat_template import CHATML_TOKENS


def get_config():
    config = default_config(preset("lemur_70b_chat").to_dict())
    config.seed = 42
    config.init.checkpoint = "gs://BUCKET/runs/lemur_70b"
    config.init.drop_rows_above = 32_000
    config.init.new_rows = "mean"  # 32,000 to 32,005 rows

    config.tokenizer.path = "gs://BUCKET/tokenizers/lemur_chat"
    config.tokenizer.extend = "gs://BUCKET/tokenizers/llama2"
    config.tokenizer.add_tokens = CHATML_TOKENS

    config.data.modules = ("lemur_tasks",)
    config.data.stores = "gs://BUCKET/stores/lemur_chat"
    config.data.sequence_length = 4096
    config.data.sources = {"lemur_chat": {"share": 1.0, "packing": "fit", "max_epochs": 2.0}}

    config.mesh.fsdp = -1
    config.train.batch_rows = 256
    config.train.steps = 300  # about two epochs of 300K conversations of 500 tokens
    config.optimizer.learning_rate = 2e-5
    config.optimizer.final_learning_rate = 2e-6
    config.optimizer.warmup_steps = 10
    config.optimizer.weight_decay = 0.1
    config.optimizer.clip_norm = 1.0

    config.eval.tasks = ("lemur_code", "lemur_text", "lemur_chat")
    config.eval.groups = {"code": ("lemur_code",), "text": ("lemur_text",), "chat": ("lemur_chat",)}
    config.eval.max_rows = 2048
    config.checkpoint.every_steps = 100
    return config
