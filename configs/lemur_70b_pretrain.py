"""Lemur-70B: Llama-2-70B pretrained further on 90B tokens, code : text = 10 : 1 (Xu et al., ICLR 2024).

Published: AdamW, betas (0.9, 0.95), weight decay 0.1, clipping at 1.0, cosine 4e-5 to 4e-6, seed 42,
4,194,304 tokens an update. Not published, chosen here: a warmup of 200 updates, T 4096.
Expected: the "Lemur-70B" row of the paper (MMLU 64.5, GSM8K 54.9, HumanEval 35.4, MBPP 53.2).
Hardware: TPU v4-512 (256 chips). `lemur plan` tells what it takes.

    export LEMUR_DATA=gs://BUCKET/data                      # see configs/lemur_tasks.py
    lemur import-hf Llama-2-70b-hf gs://BUCKET/llama2_70b
    lemur prepare --config configs/lemur_70b_pretrain.py
    lemur train --config configs/lemur_70b_pretrain.py --workdir gs://BUCKET/runs/lemur_70b
"""

from lemur_jax.config import default_config
from lemur_jax.models.presets import preset


def get_config():
    config = default_config(preset("lemur_70b").to_dict())
    config.seed = 42
    config.init.checkpoint = "gs://BUCKET/llama2_70b"
    config.init.new_rows = "mean"  # 32,000 to 32,024 rows

    config.tokenizer.path = "gs://BUCKET/tokenizers/lemur"
    config.tokenizer.extend = "gs://BUCKET/tokenizers/llama2"
    config.tokenizer.add_tokens = (
        *("<|endoftext|>", "<fim_prefix>", "<fim_middle>", "<fim_suffix>", "<fim_pad>"),
        *("<filename>", "<gh_stars>", "<issue_start>", "<issue_comment>", "<issue_closed>"),
        *("<jupyter_start>", "<jupyter_text>", "<jupyter_code>", "<jupyter_output>", "<empty_output>"),
        *("<commit_before>", "<commit_msg>", "<commit_after>", "<reponame>"),
    )

    config.data.modules = ("lemur_tasks",)
    config.data.stores = "gs://BUCKET/stores/lemur"
    config.data.sequence_length = 4096
    config.data.sources = {
        "lemur_code": {"share": 10.0, "packing": "concat", "max_epochs": 1.0},
        "lemur_text": {"share": 1.0, "packing": "concat", "max_epochs": 1.0},
    }

    config.mesh.fsdp = -1
    config.compute.remat = "offload_mlp"  # the best that `lemur plan` found on v4-512 (docs/planner.md)
    config.train.batch_rows = 1024  # × 4096 = 4,194,304 tokens
    config.train.microbatches = 2
    config.train.steps = 21_458  # 90.0B tokens
    config.optimizer.learning_rate = 4e-5
    config.optimizer.final_learning_rate = 4e-6
    config.optimizer.warmup_steps = 200
    config.optimizer.weight_decay = 0.1
    config.optimizer.clip_norm = 1.0

    config.eval.tasks = ("lemur_code", "lemur_text")
    config.eval.groups = {"code": ("lemur_code",), "text": ("lemur_text",)}
    config.eval.every_steps = 1000
    config.eval.max_rows = 2048
    config.checkpoint.every_steps = 500
    return config
