"""Lemur-70B-Chat: Lemur-70B tuned on 367,818 text and code conversations in ChatML (Xu et al., ICLR 2024).

From the paper: the four sets of Table 1 with their sizes; two epochs, Adam, 2e-5, a batch of 128 conversations
(A.2.2); ChatML with loss on the assistant's turns alone, vocabulary 32,005. The base model's ids from 32,000 on
mean other tokens and are dropped first. The paper's trainer held one conversation in each row of its batch;
here rows are packed, and `batch_rows` and `steps` are chosen so that an update holds about 128 conversations
and the run two epochs (a mean of 512 tokens a conversation is assumed; `lemur prepare` prints both for your
data). Not published, chosen here: cosine to 2e-6 after 3% of warmup, weight decay 0.
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

# Table 1: conversations, and rounds of each.
CONVERSATIONS = {
    "openassistant": (34_546, 1.6),
    "openorca": (200_000, 1.0),
    "sharegpt": (81_319, 6.0),
    "evol_code_alpaca": (51_952, 1.0),
}


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
    # Shares of tokens; taken as proportional to conversations × rounds, as the paper gives no tokens.
    config.data.sources = {
        name: {"share": count * rounds, "packing": "fit", "max_epochs": 0.0}
        for name, (count, rounds) in CONVERSATIONS.items()
    }
    # The paper's filters: English by langdetect (here py3langid), near duplicates removed (there by embeddings).
    config.prepare.steps = {
        "openassistant": {"metadata": {"lang": ("en",)}},
        "sharegpt": {"language": {"keep": ("en",)}, "near_duplicates": {}},
    }

    config.mesh.fsdp = -1
    config.mesh.tensor = 4
    config.train.batch_rows = 16  # of 4096 tokens: 128 conversations of 512
    config.train.steps = 5747  # 2 × 367,818 / 128
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
