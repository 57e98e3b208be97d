"""Lemur's first stage on long rows: Llama-2-7B at 32,768 tokens, or Llama-3.1-8B at 131,072 with `:128k`.

`:yarn32k` and then `:yarn128k` extend Llama-2-7B from its 4096 positions in two stages by YaRN (Peng et al. 2023):
factors 8 and 32, 400 and 200 updates of 4,194,304 tokens; the second starts from the first's result.

Other options are those of `lemur_70b_pretrain.py`. Chosen here, not published: 4,194,304 tokens an update, and for
Llama-2, which was trained on 4096 positions, Code Llama's rotary base, 1,000,000 (Rozière et al. 2023).
Hardware: TPU v5e-256, positions sharded over `config.mesh.sequence`. `lemur plan` estimates memory and time.

    export LEMUR_DATA=gs://BUCKET/data                      # see configs/lemur_tasks.py
    lemur plan --config configs/long_context.py:128k --topology v5e-256
    lemur prepare --config configs/long_context.py:128k
    lemur train --config configs/long_context.py:128k --workdir gs://BUCKET/runs/long_128k
"""

import lemur_70b_pretrain

from lemur_jax.models.presets import preset

# factor of the length, updates, initial checkpoint, devices of a row
YARN = {
    "yarn32k": (8, 400, "gs://BUCKET/llama2_7b", 4),
    "yarn128k": (32, 200, "gs://BUCKET/runs/yarn32k", 16),
}


def get_config(arg: str = "32k"):
    config = lemur_70b_pretrain.get_config()
    if arg == "128k":
        model = preset("llama3.1_8b")
        config.init.checkpoint = "gs://BUCKET/llama3.1_8b"
        config.init.new_rows = "refuse"
        config.tokenizer.path = "gs://BUCKET/tokenizers/llama3"
        config.tokenizer.extend, config.tokenizer.add_tokens = "", ()
        config.data.stores = "gs://BUCKET/stores/llama3"
        config.mesh.sequence = 16
        config.compute.remat = "offload_full"  # offloads layer inputs to the host: 2 GiB a chip
    elif arg == "32k":
        model = preset("llama2_7b", vocab_size=32_024, max_position_embeddings=32_768, rope_theta=1_000_000.0)
        config.init.checkpoint, config.init.change_rope = "gs://BUCKET/llama2_7b", True
        config.mesh.sequence = 4
        config.compute.remat = "attention"
    elif arg in YARN:
        factor, config.train.steps, config.init.checkpoint, config.mesh.sequence = YARN[arg]
        config.init.change_rope = True
        model = preset(
            "llama2_7b",
            vocab_size=32_024,
            max_position_embeddings=4096 * factor,
            rope_scaling="yarn",
            rope_factor=float(factor),
            rope_original_max_position_embeddings=4096,
        )
        config.optimizer.learning_rate, config.optimizer.final_learning_rate = 2e-5, 2e-5
        config.optimizer.warmup_steps = 20
        config.compute.remat = "offload_full"
    else:
        raise ValueError(f"unknown length {arg!r}: write :32k, :128k, :yarn32k or :yarn128k")
    config.model.update(model.to_dict())
    config.data.sequence_length = model.max_position_embeddings
    config.train.batch_rows = 4_194_304 // config.data.sequence_length
    config.train.microbatches = 2
    # Over all devices of a row; with the default of 512 the head would be gathered 64 or 256 times a row.
    config.compute.loss_chunk = 8192
    return config
