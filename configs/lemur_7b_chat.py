"""Lemur's second stage on the 7B model: `lemur_70b_chat.py` with the smaller model.

Hardware: TPU v4-32 (16 chips), or any slice that `lemur plan` says fits.

    export LEMUR_DATA=gs://BUCKET/data                      # see configs/lemur_tasks.py
    lemur prepare --config configs/lemur_7b_chat.py
    lemur train --config configs/lemur_7b_chat.py --workdir gs://BUCKET/runs/lemur_7b_chat
    lemur export-hf gs://BUCKET/runs/lemur_7b_chat lemur-7b-chat
"""

import lemur_70b_chat

from lemur_jax.models.presets import preset


def get_config():
    config = lemur_70b_chat.get_config()
    config.model.update(preset("llama2_7b", vocab_size=32_005).to_dict())
    config.init.checkpoint = "gs://BUCKET/runs/lemur_7b"
    config.mesh.tensor = 1
    return config
