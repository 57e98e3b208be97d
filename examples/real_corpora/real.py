"""Continued pretraining of SmolLM2-135M-Instruct on code in six languages and on manuals, 10 : 1 by tokens.

Data: Debian packages, see `fetch.py`. Held out: documents of both, and a book.

    real.py            0.4M tokens: about an hour on 2 CPU cores, 5 GB of memory
    real.py:gpu        20M tokens: about 10 minutes on one GPU of 80 GB (estimated, not run)
    real.py:sweep      16,384 tokens with a constant learning rate, for `lemur sweep` (docs/harmony.md)
    real.py:sweep_gpu  the same with 20M tokens

`bash examples/real_corpora/run.sh` fetches the corpora, prepares, trains and writes the report.
"""

from lemur_jax import config_from_checkpoint


def get_config(variant: str = ""):
    if variant not in ("", "gpu", "sweep", "sweep_gpu"):
        raise ValueError(f"unknown variant {variant!r}: write :gpu, :sweep, :sweep_gpu, or nothing")
    gpu, sweep = variant.endswith("gpu"), variant.startswith("sweep")
    config = config_from_checkpoint("quickstart/smollm2/base")
    config.compute.dtype = "bfloat16" if gpu else "float32"  # a CPU gains nothing from bfloat16
    config.compute.remat = "none"
    config.compute.loss_chunk = 0 if gpu else 128

    config.data.modules = ("real_tasks",)
    config.data.stores = "real_corpora/stores"
    config.data.sequence_length = 2048 if gpu else 512
    config.data.sources = {
        "code": {"share": 10.0, "packing": "concat", "max_epochs": 2.0},
        "manuals": {"share": 1.0, "packing": "concat", "max_epochs": 4.0},
    }
    config.prepare.held_out_tasks = ("book",)
    config.prepare.steps = {
        "code": {"decontaminate": {"against": ("human_eval",)}, "exact_duplicates": {}, "near_duplicates": {}}
    }

    config.train.batch_rows = 32 if gpu else 2
    config.train.steps = 305 if gpu else 400  # 20.0M and 0.41M tokens
    config.optimizer.learning_rate = 3e-4 if gpu else 1e-4
    config.optimizer.final_learning_rate = config.optimizer.learning_rate / 10
    config.optimizer.warmup_steps = 20

    config.eval.tasks = ("code", "manuals", "book")
    config.eval.groups = {"code": ("code",), "manuals": ("manuals",), "book": ("book",)}
    config.eval.every_steps = 100
    config.eval.max_rows = 64 if gpu else 16
    config.checkpoint.every_steps = 100
    config.checkpoint.keep = 1
    config.log.every_steps = 10
    if sweep:
        # At a constant rate, an intermediate evaluation equals that of a shorter run, so the law can be fitted to it.
        config.train.steps = 304 if gpu else 16
        config.optimizer.learning_rate = config.optimizer.final_learning_rate = 2e-4
        config.optimizer.warmup_steps = 20 if gpu else 2
        config.eval.every_steps = 76 if gpu else 8
        config.eval.max_rows = 64 if gpu else 12
        config.checkpoint.every_steps = config.train.steps
    return config
