"""Configs of sweeps."""

from lemur_jax.config import default_config, from_config_dict
from lemur_jax.models.presets import preset


def config_of(tasks=("code", "text"), **shares):
    """A config of the tiny model with these held-out tasks and shares of the sources."""
    config = default_config(preset("tiny"))
    shares = shares or {"code": 10.0, "text": 1.0}
    config.data.sources = {name: {"share": share, "packing": "concat"} for name, share in shares.items()}
    config.eval.tasks = tasks
    return from_config_dict(config)
