"""Configs of sweeps, and the figures of their runs."""

from lemur_jax.config import default_config, from_config_dict
from lemur_jax.models.presets import preset
from lemur_jax.sweep.results import Variant
from lemur_jax.telemetry.metrics import MetricsWriter


def config_of(tasks=("code", "text"), **shares):
    """A config of the tiny model with these held-out tasks and shares of the sources."""
    config = default_config(preset("tiny"))
    shares = shares or {"code": 10.0, "text": 1.0}
    config.data.sources = {name: {"share": share, "packing": "concat"} for name, share in shares.items()}
    config.eval.tasks = tasks
    return from_config_dict(config)


def variant(name, code, text, merged=False):
    """A variant with these bits per byte of each seed, and a balance of 0.1."""
    bits = {"code": tuple(code), "text": tuple(text)}
    return Variant(
        name=name, merged=merged, seeds=tuple(range(len(code))), bits=bits, balance=(0.1,) * len(code)
    )


def write_run(workdir, run, bits, changes):
    """Metrics of a run: at each step of `changes` the bits per byte of every task times the change, and a score."""
    with MetricsWriter(run.directory(workdir)) as writer:
        for step, change in changes.items():
            for task, value in bits.items():
                writer.write({"step": step, "kind": "eval", "task": task, "bits_per_byte": change * value})
            writer.write({"step": step, "kind": "balance", "balance": 1 - change})
