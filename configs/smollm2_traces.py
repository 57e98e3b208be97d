"""SmolLM2-135M-Instruct tuned on what worked: episodes of agents that `lemur export-traces` wrote, loss on the
agent's turns alone. The model is that of `smollm2_lemur.py`, before its training.

Hardware: 2 CPU cores, 2 minutes of processor time; 5 GB of memory (docs/agents.md has a run).

    lemur export-traces --traces agents.json --output quickstart/traces/solved.jsonl --config configs/smollm2_traces.py
    lemur train --config configs/smollm2_traces.py --workdir quickstart/traces/tuned
"""

import smollm2_lemur


def get_config():
    config = smollm2_lemur.get_config()
    config.data.modules = ("traces_tasks",)
    config.data.stores = "quickstart/traces/stores"
    config.data.sources = {"traces": {"share": 1.0, "packing": "fit", "max_epochs": 2.0}}

    config.train.steps = 6
    config.optimizer.learning_rate = 5e-5
    config.optimizer.final_learning_rate = 5e-6
    config.optimizer.warmup_steps = 1

    config.eval.tasks = ("traces",)
    config.eval.groups = {}
    config.checkpoint.every_steps = 6
    return config
