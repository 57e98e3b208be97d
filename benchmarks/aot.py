"""Compiles whole train steps for TPU slices and estimates their speed, beside MaxText's estimates.

    python benchmarks/aot.py                            # all: 2 to 5 minutes and 2 to 3 GiB each
    python benchmarks/aot.py --only 7b

Prints one JSON line per program. Every figure is an **estimate** from the compiler's schedule; nothing is measured.
MaxText's figures are not from this run: they are the same estimate for MaxText 0.2.5 with the same compiler, made on
2026-11-23. They are null where there are none.

Programs that offload depend on the assumed bandwidth to the host (`cost.Chip.host`), so they are also estimated with
other bandwidths, for the same schedule.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import tempfile

from lemur_jax.config import RunConfig, replace
from lemur_jax.models.presets import preset


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """A program to compile.

    Attributes:
      model, topology: preset and slice.
      rows: rows of 4096 tokens per update.
      microbatches, remat, loss_chunk, gate_share: as in the config.
      maxtext, setting: MaxText's estimate in tokens/s/chip, and its options.
    """

    model: str
    topology: str
    rows: int
    microbatches: int
    remat: str
    loss_chunk: int = 512
    gate_share: float = 0.0
    maxtext: float | None = None
    setting: str = ""


_70B_BY_MAXTEXT = dict(maxtext=362.0, setting="asynchronous gathers; 348 by default")
PROGRAMS = {
    **{
        "70b-v4-512" + suffix: Step(
            model="llama2_70b", topology="v4-512", rows=1024, microbatches=2, remat="offload_mlp", gate_share=share,
            **_70B_BY_MAXTEXT,
        )
        for suffix, share in (("", 0.0), ("-gate-0.25", 0.25), ("-gate-0.5", 0.5), ("-gate-0.625", 0.625))
    },
    "70b-v4-512-no-offload": Step(
        model="llama2_70b", topology="v4-512", rows=1024, microbatches=4, remat="attention_all", **_70B_BY_MAXTEXT
    ),
    "70b-v5p-128": Step(model="llama2_70b", topology="v5p-128", rows=256, microbatches=1, remat="attention_all"),
    "7b-v4-32": Step(
        model="llama2_7b", topology="v4-32", rows=64, microbatches=2, remat="mlp_gate", loss_chunk=0,
        maxtext=2875.0, setting="windowed einsum off; 1,686 by default",
    ),
    "7b-v5e-256": Step(
        model="llama2_7b", topology="v5e-256", rows=1024, microbatches=2, remat="attention_all", loss_chunk=0,
        gate_share=0.5, maxtext=2367.0,
    ),
}  # fmt: skip
LENGTH = 4096
# Bytes per second between chip and host: PCIe 3.0 x16, shared or poorly used, and PCIe 4.0.
OTHER_HOST_SPEEDS = (6e9, 8e9, 10e9, 24e9)
_KEPT = (
    "fits", "tokens_per_second_per_chip", "step_seconds", "tokens_per_step", "mfu", "mfu_full_attention",
    "hbm_bytes_per_chip", "host_bytes_per_chip", "compile_seconds", "parts", "collectives", "versions",
)  # fmt: skip


def record(name: str) -> dict:
    """Compiles one program and estimates it."""
    from lemur_jax.plan.plan import plan

    step = PROGRAMS[name]
    options = {
        "data.sequence_length": LENGTH,
        "train.batch_rows": step.rows,
        "train.microbatches": step.microbatches,
        "compute.remat": step.remat,
        "compute.loss_chunk": step.loss_chunk,
        "compute.gate_share": step.gate_share,
    }
    config = replace(RunConfig(model=preset(step.model)), options)
    with tempfile.TemporaryDirectory() as directory:
        text = pathlib.Path(directory, "step.hlo")
        made = plan(config, step.topology, hlo_path=str(text))
        other = at_other_speeds(config, step.topology, text.read_text()) if made.host_bytes_per_chip else {}
    rate = made.tokens_per_second_per_chip
    return {
        "program": name,
        "estimated": True,
        "remat": step.remat,
        "microbatches": step.microbatches,
        **{key: getattr(made, key) for key in _KEPT},
        "tokens_per_second_per_chip_at_host_gb_s": other,
        "maxtext_tokens_per_second_per_chip": step.maxtext,
        "maxtext_setting": step.setting,
        "maxtext_from_this_run": False,
        "ratio": rate / step.maxtext if rate and step.maxtext else None,
    }


def at_other_speeds(config, topology: str, text: str) -> dict[str, float]:
    """GB/s to the host -> tokens/s/chip of the compiled program `text`."""
    from lemur_jax.parallel.mesh import make_mesh
    from lemur_jax.plan import cost, hlo, topologies

    tpu = topologies.find_slice(topology)
    devices = list(make_mesh(config.mesh, topologies.described_devices(tpu)).devices.flat)
    rates = {}
    for speed in OTHER_HOST_SPEEDS:
        other = dataclasses.replace(tpu, generation=dataclasses.replace(tpu.generation, host=speed))
        seconds = cost.Estimator(hlo.parse(text), cost.Network(other, devices)).run().seconds
        rates[f"{speed / 1e9:.0f}"] = config.train.batch_rows * LENGTH / seconds / tpu.chips
    return rates


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", default="", help=f"programs whose name begins with this: {', '.join(PROGRAMS)}"
    )
    options = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = "cpu"
    for name in PROGRAMS:
        if name.startswith(options.only):
            print(json.dumps(record(name)), flush=True)


if __name__ == "__main__":
    main()
