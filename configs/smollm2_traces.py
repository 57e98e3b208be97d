"""SmolLM2-135M-Instruct tuned on solved episodes that `lemur export-traces` wrote, with loss on the agent's turns only.
The model is the quickstart's before training; learning rates are those of `smollm2_chat.py`.

Hardware: 2 CPU cores, 2 minutes of CPU time; 5 GB of memory (docs/agents.md has a run).

    lemur export-traces --traces agents.json --output quickstart/traces/solved.jsonl --config configs/smollm2_traces.py
    lemur train --config configs/smollm2_traces.py --workdir quickstart/traces/tuned
"""

import smollm2_chat


def get_config():
    config = smollm2_chat.get_config()
    config.init.checkpoint = "quickstart/smollm2/base"
    config.data.modules = ("traces_tasks",)
    config.data.stores = "quickstart/traces/stores"
    config.data.sources = {"traces": {"share": 1.0, "packing": "fit", "max_epochs": 2.0}}

    config.train.steps = config.checkpoint.every_steps = 6
    config.eval.tasks = ("traces",)
    config.eval.groups = {}
    return config
