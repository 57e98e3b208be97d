"""Quickstart from scratch, LoRA: more chat tuning with an adapter; the model's weights are frozen.

Data and hardware as in `quickstart_chat.py`. The adapter has 4% as many parameters as the model; checkpoints hold only
the adapter.

    lemur train --config configs/quickstart_lora.py --workdir quickstart/runs/lora
    lemur export-hf quickstart/runs/lora quickstart/hf/lora --adapter
"""

import quickstart_chat


def get_config():
    config = quickstart_chat.get_config()
    config.init.checkpoint = "quickstart/runs/chat"
    config.init.new_rows = "refuse"
    config.adapter.rank = 8
    config.adapter.alpha = 16.0
    config.adapter.base_dtype = "float32"
    config.train.steps = 60
    config.optimizer.learning_rate = 2e-3
    config.optimizer.final_learning_rate = 2e-4
    config.optimizer.weight_decay = 0.0
    config.checkpoint.every_steps = 30
    return config
