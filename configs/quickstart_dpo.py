"""Quickstart from scratch, DPO: an adapter of the chat model, trained on pairs of answers.

Data: the questions of `python_chat`; the real answer is chosen, that of another question rejected (`python_pairs`).
Hardware: 2 CPU cores, about 2 minutes. Other losses: `:ipo`, `:simpo`, `:orpo`, `:kto`.

    lemur prepare --config configs/quickstart_dpo.py
    lemur train --config configs/quickstart_dpo.py --workdir quickstart/runs/dpo
"""

import quickstart_lora


def get_config(arg: str = "dpo"):
    config = quickstart_lora.get_config()
    config.preference.loss = arg
    config.data.sequence_length = 1024
    config.data.sources = {"python_pairs": {"share": 1.0, "packing": "fit"}}
    config.train.steps = 40
    config.train.batch_rows = 4
    config.eval.tasks = ("python_chat",)
    config.eval.groups = {}
    config.eval.max_rows = 50
    config.log.every_steps = 5
    return config
