"""Continued pretraining at code : text = 10 : 1, Lemur's recipe, of Qwen2.5-Coder-7B, Qwen3-8B, Llama-3.1-8B.

Data, schedule and 4,194,304 tokens an update are those of `lemur_70b_pretrain.py`; the vocabulary is unchanged. Chosen
here, not published: 20B tokens, as these models have seen far more code than Llama-2, and 2e-5.
Hardware: TPU v5p-128 (64 chips). `lemur plan` estimates memory and time.

    export LEMUR_DATA=gs://BUCKET/data                      # see configs/lemur_tasks.py
    lemur prepare --config configs/adapt_pretrain.py:qwen3_8b
    lemur train --config configs/adapt_pretrain.py:qwen3_8b --workdir gs://BUCKET/runs/qwen3_8b

The argument after the colon is `qwen2.5_coder_7b` (the default), `qwen3_8b` or `llama3.1_8b`.
"""

import lemur_70b_pretrain

from lemur_jax.models.presets import preset

MODELS = ("qwen2.5_coder_7b", "qwen3_8b", "llama3.1_8b")


def get_config(name: str = MODELS[0]):
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}: write one of {', '.join(MODELS)} after the colon")
    config = lemur_70b_pretrain.get_config()
    config.model.update(preset(name).to_dict())
    config.init.checkpoint = config.tokenizer.path = f"gs://BUCKET/{name}"
    config.init.new_rows = "refuse"
    config.tokenizer.extend, config.tokenizer.add_tokens = "", ()
    config.data.stores = f"gs://BUCKET/stores/{name}"
    config.compute.remat = "mlp"
    config.train.steps = 4768  # 20.0B tokens
    config.optimizer.learning_rate = 2e-5
    config.optimizer.final_learning_rate = 2e-6
    config.optimizer.warmup_steps = 200
    return config
