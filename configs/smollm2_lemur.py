"""Quickstart, stage 4: continued pretraining of SmolLM2-135M-Instruct, code : text = 10 : 1 by tokens.

Data: the standard library's source (`python_stdlib`) and documentation (`python_docs`), see `quickstart_tasks.py`.
Hardware: 2 CPU cores, about 4 minutes with the evaluations; 5 GB of memory.

    lemur prepare --config configs/smollm2_lemur.py
    lemur train --config configs/smollm2_lemur.py --workdir quickstart/smollm2/lemur
"""

from lemur_jax import config_from_checkpoint

BASE = "quickstart/smollm2/base"  # the pretrained model's Hugging Face directory


def get_config():
    config = config_from_checkpoint(BASE)
    config.compute.dtype = "float32"  # a CPU gains nothing from bfloat16
    config.compute.remat = "none"
    config.compute.loss_chunk = 128

    config.data.modules = ("quickstart_tasks",)
    config.data.stores = "quickstart/smollm2/stores"
    config.data.sequence_length = 512
    config.data.sources = {
        "python_stdlib": {"share": 10.0, "packing": "concat", "max_epochs": 1.0},
        "python_docs": {"share": 1.0, "packing": "concat", "max_epochs": 1.0},
    }

    config.train.steps = 22  # 44 rows: 40 of code, 4 of text
    config.train.batch_rows = 2
    config.optimizer.learning_rate = 1e-4
    config.optimizer.final_learning_rate = 1e-5
    config.optimizer.warmup_steps = 2

    config.eval.tasks = ("python_stdlib", "python_docs")
    config.eval.groups = {"code": ("python_stdlib",), "text": ("python_docs",)}
    config.eval.max_rows = 8
    config.checkpoint.every_steps = 11
    config.checkpoint.keep = 1
    config.log.every_steps = 2
    return config
