"""Quickstart, stage 2: code-heavy continued pretraining, code : text = 10 : 1 by tokens.

Starts from stage 1, which went through a Hugging Face directory as Llama-2 would.
Data: the standard library's source (`python_stdlib`) and documentation (`python_docs`).
Hardware: 2 CPU cores, about 2 minutes.

    lemur prepare --config configs/quickstart_lemur.py
    lemur train --config configs/quickstart_lemur.py --workdir quickstart/runs/lemur

`configs/quickstart_lemur.py:annealed` ends with as much text as code, in the last fifth of its steps.
"""

from lemur_jax.config import default_config
from lemur_jax.models.presets import preset


def get_config(arg: str = ""):
    config = default_config(preset("quickstart"))
    config.compute.dtype = "float32"
    config.compute.remat = "none"
    config.compute.loss_chunk = 64
    config.init.checkpoint = "quickstart/imported"

    config.tokenizer.path = "quickstart/tokenizer"
    config.data.modules = ("quickstart_tasks",)
    config.data.stores = "quickstart/stores"
    config.data.sequence_length = 256
    config.data.sources = {
        "python_stdlib": {"share": 10.0, "packing": "concat", "max_epochs": 1.0},
        "python_docs": {"share": 1.0, "packing": "concat", "max_epochs": 4.0},
    }

    if arg == "annealed":
        config.data.stages = {"anneal": {"step": 256, "shares": {"python_stdlib": 10.0, "python_docs": 10.0}}}
    elif arg:
        raise ValueError(f"{arg!r} is no variant: write :annealed, or nothing")

    config.train.steps = 320
    config.train.batch_rows = 16
    config.optimizer.learning_rate = 1e-3
    config.optimizer.final_learning_rate = 1e-4
    config.optimizer.warmup_steps = 20

    config.eval.tasks = ("python_stdlib", "python_docs")
    config.eval.groups = {"code": ("python_stdlib",), "text": ("python_docs",)}
    config.eval.every_steps = 160
    config.eval.max_rows = 400
    config.checkpoint.every_steps = 200
    config.log.every_steps = 20
    return config
