"""Lemur-70B-Chat: Lemur-70B tuned on 367,817 text and code conversations in ChatML (Xu et al., ICLR 2024).

From the paper: the four sets of Table 1 and their filters; two epochs, Adam, 2e-5, a batch of 128 conversations
(A.2.2); ChatML with loss on the assistant's turns only, vocabulary 32,005. The base model's ids from 32,000 on
mean other tokens and are dropped first. The paper's trainer held one conversation in each row; here rows are packed:
`lemur prepare` counts conversations and rows, and from these `epochs` and `batch_documents` give the shares, the rows
of an update (a multiple of 16 on this mesh) that hold 128 conversations on average, and the updates of two epochs.
Not published, chosen here: cosine to 2e-6 after 3% of warmup, weight decay 0.
Expected: the "Lemur-70B-Chat" row of the paper (MMLU 65.3, GSM8K 66.3, HumanEval 61.0, MBPP 55.5).
Hardware: TPU v4-128 (64 chips) as fsdp 16 × tensor 4, or any slice that `lemur plan` says fits.

    export LEMUR_DATA=gs://BUCKET/data                      # see configs/lemur_tasks.py
    lemur prepare --config configs/lemur_70b_chat.py
    lemur train --config configs/lemur_70b_chat.py --workdir gs://BUCKET/runs/lemur_70b_chat
    lemur export-hf gs://BUCKET/runs/lemur_70b_chat lemur-70b-chat
"""

from lemur_jax.config import default_config
from lemur_jax.models.presets import preset
from lemur_jax.text.chat_template import CHATML_TOKENS

# Table 1: conversations after the filters.
CONVERSATIONS = {"openassistant": 34_546, "openorca": 200_000, "sharegpt": 81_319, "evol_code_alpaca": 51_952}


def get_config():
    config = default_config(preset("lemur_70b_chat"))
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
    config.data.sources = {name: {"epochs": 2.0, "packing": "fit"} for name in CONVERSATIONS}
    # The paper's filters of ShareGPT: English by langdetect (here py3langid), no three or more non-English characters
    # in a row, near duplicates removed (there by the similarity of embeddings).
    config.prepare.steps = {
        "openassistant": {"metadata": {"lang": ("en",)}},
        "sharegpt": {"language": {"keep": ("en",)}, "foreign_letters": {"run": 3}, "near_duplicates": {}},
    }

    config.mesh.fsdp = 16
    config.mesh.tensor = 4
    config.train.batch_documents = 128
    config.train.batch_rows = 16  # used by `lemur plan` only: 128 conversations of 512 tokens
    config.train.steps = 5748  # likewise: 2 × 367,817 / 128
    config.optimizer.learning_rate = 2e-5
    config.optimizer.final_learning_rate = 2e-6
    config.optimizer.warmup_steps = 172
    config.optimizer.weight_decay = 0.0
    config.optimizer.clip_norm = 1.0

    config.eval.tasks = tuple(CONVERSATIONS)
    config.eval.groups = {"chat": tuple(CONVERSATIONS)}
    config.eval.max_rows = 2048
    config.checkpoint.every_steps = 500
    return config
