"""Chat tuning after `adapt_pretrain.py`, on Lemur's four sets of conversations, loss on the assistant's turns only.

Data, steps and learning rate are those of `lemur_70b_chat.py`. Qwen's vocabularies have ChatML's tokens; Llama-3.1's
is extended by them.
Hardware: TPU v5p-32 (16 chips). `lemur plan` estimates memory and time.

    export LEMUR_DATA=gs://BUCKET/data                      # see configs/lemur_tasks.py
    lemur prepare --config configs/adapt_chat.py:qwen3_8b
    lemur train --config configs/adapt_chat.py:qwen3_8b --workdir gs://BUCKET/runs/qwen3_8b_chat
    lemur export-hf gs://BUCKET/runs/qwen3_8b_chat qwen3-8b-chat

Without an argument, the model is the first of `adapt_pretrain.py`.
"""

import adapt_pretrain
import lemur_70b_chat

from lemur_jax.models.presets import preset


def get_config(name: str = adapt_pretrain.MODELS[0]):
    base = adapt_pretrain.get_config(name)  # refuses other models
    config = lemur_70b_chat.get_config()
    config.model.update(preset(name).to_dict())
    config.init.checkpoint = f"gs://BUCKET/runs/{name}"
    config.init.drop_rows_above = 0
    config.init.new_rows = "refuse"
    config.tokenizer.extend = base.tokenizer.path
    config.tokenizer.path = f"gs://BUCKET/tokenizers/{name}_chat"
    config.tokenizer.add_tokens = ()
    if name.startswith("llama"):
        config.init.new_rows = "mean"
        config.tokenizer.add_tokens = ("<|im_start|>", "<|im_end|>")
        config.model.vocab_size += 2
    config.data.stores = f"gs://BUCKET/stores/{name}_chat"
    config.mesh.tensor = 1
    return config
