"""Three small stages as `lemur train` leaves them."""

import json
import math
from pathlib import Path

import pytest

from lemur_jax.config import default_config, from_config_dict
from lemur_jax.models.presets import preset
from lemur_jax.telemetry.metrics import MetricsWriter

# Bits per byte at the end of each stage; the table is worked out by hand from these.
BITS = {
    "base": {"python_docs": 2.0, "python_stdlib": 4.0},
    "lemur": {"python_docs": 2.1, "python_stdlib": 3.0},
    "chat": {"python_docs": 2.0, "python_stdlib": 3.3, "python_chat": 1.25},
}
STEPS = 40


def write_stage(
    workdir: Path, bits: dict[str, float], *, steps: int = STEPS, planned: int = STEPS, **options
):
    """Metrics of every step, evaluations in the middle and at the end, and the config."""
    config = default_config(preset("tiny"))
    config.train.steps = planned
    config.data.sources = {"python_docs": {"share": 1.0}, "python_stdlib": {"share": 4.0}}
    config.update(options)
    workdir.mkdir(parents=True)
    (workdir / "config.json").write_text(json.dumps(from_config_dict(config).to_json()))
    with MetricsWriter(workdir) as writer:
        for step in range(1, steps + 1):
            loss = 4.0 - 2.0 * step / steps
            record = {"step": step, "kind": "train", "loss": loss, "learning_rate": 1e-3 * step / steps}
            record |= {"grad_norm": math.nan if step == 20 else 8.0 / step, "tokens_per_second": 500.0}
            record |= {"tokens": 1000 * step, "loss/python_docs": loss, "loss/python_stdlib": loss + 1}
            writer.write(record | {"tokens/python_docs": 250 * step, "tokens/python_stdlib": 750 * step})
            if step in (steps // 2, steps):
                for task, value in bits.items():
                    value += 0.5 * (step < steps)
                    record = {"step": step, "kind": "eval", "task": task, "loss": 2 * value, "tokens": 300}
                    writer.write(record | {"bits_per_byte": value, "bytes": 999})
        parts = dict(steps=6000, startup=60, compile=540, lost=900, data_wait=0, eval=0, other=0)
        time = {f"{part}_seconds": seconds for part, seconds in parts.items()}
        writer.write({"step": steps, "kind": "time", "wall_seconds": 7500, "goodput": 0.8, **time})
    return workdir


@pytest.fixture(name="write_stage")
def write_stage_fixture():
    return write_stage


@pytest.fixture
def stages(tmp_path) -> list[Path]:
    """Workdirs of base, lemur and chat."""
    return [write_stage(tmp_path / name, bits, seed=seed) for seed, (name, bits) in enumerate(BITS.items())]
