"""Quickstart from scratch, Lemur: code-heavy continued pretraining, code : text = 10 : 1 by tokens.

Starts from the base model, imported from a Hugging Face directory as Llama-2 would be.
Data: the standard library's source (`python_stdlib`) and documentation (`python_docs`).
Hardware: 2 CPU cores, about 2 minutes.

    lemur prepare --config configs/quickstart_lemur.py
    lemur train --config configs/quickstart_lemur.py --workdir quickstart/runs/lemur

`configs/quickstart_lemur.py:annealed` trains on equal shares of code and text in the last fifth of its steps.
"""

import quickstart_base


def get_config(arg: str = ""):
    config = quickstart_base.get_config()
    config.init.checkpoint = "quickstart/imported"
    config.tokenizer.train_vocab_size = 0
    config.tokenizer.train_tasks = ()
    config.data.sources = {
        "python_stdlib": {"share": 10.0, "packing": "concat", "max_epochs": 1.0},
        "python_docs": {"share": 1.0, "packing": "concat", "max_epochs": 4.0},
    }

    if arg == "annealed":
        config.data.stages = {"anneal": {"step": 256, "shares": {"python_stdlib": 10.0, "python_docs": 10.0}}}
    elif arg:
        raise ValueError(f"unknown variant {arg!r}: write :annealed, or nothing")

    config.train.steps = 320
    config.optimizer.learning_rate = 1e-3
    config.optimizer.final_learning_rate = 1e-4
    config.optimizer.warmup_steps = 20

    config.eval.groups = {"code": ("python_stdlib",), "text": ("python_docs",)}
    config.eval.every_steps = 160
    return config
