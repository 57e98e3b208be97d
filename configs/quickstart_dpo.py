"""Quickstart from nothing, with preferences: DPO of an adapter on pairs of answers, from the chat model.

Data: the questions of `python_chat`; the real answer is preferred to that of another question (`python_pairs`).
Hardware: 2 CPU cores, about 2 minutes. `:ipo`, `:simpo`, `:orpo` and `:kto` take another loss.

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
