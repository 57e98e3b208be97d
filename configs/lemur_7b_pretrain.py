"""Lemur's first stage on Llama-2-7B: `lemur_70b_pretrain.py` with the smaller model.

Hardware: TPU v4-32 (16 chips); for a v5e-256 see `docs/planner_details.md`, "Search".
`lemur plan` estimates memory and time (docs/planner.md).

    export LEMUR_DATA=gs://BUCKET/data                      # see configs/lemur_tasks.py
    lemur import-hf Llama-2-7b-hf gs://BUCKET/llama2_7b
    lemur prepare --config configs/lemur_7b_pretrain.py
    lemur train --config configs/lemur_7b_pretrain.py --workdir gs://BUCKET/runs/lemur_7b
"""

import lemur_70b_pretrain

from lemur_jax.models.presets import preset


def get_config():
    config = lemur_70b_pretrain.get_config()
    config.model.update(preset("llama2_7b", vocab_size=32_024).to_dict())
    config.init.checkpoint = "gs://BUCKET/llama2_7b"
    # Found by `lemur plan --search` for v4-32: 2 rows a chip at a time, and all their logits.
    config.compute.remat = "mlp_gate"
    config.compute.loss_chunk = 0
    config.train.microbatches = 32
    return config
