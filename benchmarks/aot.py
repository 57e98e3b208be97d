"""Whole train steps compiled for TPU slices that are not there: ours, with MaxText's estimates beside it.

    python benchmarks/aot.py                            # all: 2 to 5 minutes and 2 to 3 GiB each
    python benchmarks/aot.py --only 7b

One JSON line a program. Every figure is an **estimate** from the compiler's schedule; nothing is measured. MaxText's
column is not from this run: it is MaxText 0.2.5 put through the same compiler and the same kind of estimate, written
down with the marks of this project on 2026-11-23. Where it is null there is no such figure.
"""

import argparse
import json
import os

from lemur_jax.common.config import default_config
from lemur_jax.models.presets import preset

# name: (preset, slice, rows of 4096 tokens an update, microbatches, remat, MaxText's tokens/s/chip, with what)
PROGRAMS = {
    "70b-v4-512": (
        "llama2_70b",
        "v4-512",
        1024,
        2,
        "offload_mlp",
        362.0,
        "asynchronous gathers; 348 by default",
    ),
    "70b-v5p-128": ("llama2_70b", "v5p-128", 256, 1, "mlp", None, ""),
    "7b-v4-32": ("llama2_7b", "v4-32", 1024, 16, "mlp", 2875.0, "windowed einsum off; 1,686 by default"),
    "7b-v5e-256": ("llama2_7b", "v5e-256", 1024, 1, "mlp", 2367.0, ""),
}
LENGTH = 4096


def record(name: str) -> dict:
    """Compiles one program and estimates it."""
    from lemur_jax.plan.plan import plan

    model, topology, rows, microbatches, remat, theirs, setting = PROGRAMS[name]
    config = default_config(preset(model).to_dict())
    config.data.sequence_length = LENGTH
    config.train.batch_rows, config.train.microbatches = rows, microbatches
    config.compute.remat = remat
    made = plan(config, topology)
    keep = (
        "fits",
        "tokens_per_second_per_chip",
        "step_seconds",
        "tokens_per_step",
        "mfu",
        "mfu_full_attention",
    )
    keep += ("hbm_bytes_per_chip", "compile_seconds", "parts", "versions")
    facts = {key: getattr(made, key) for key in keep}
    rate = made.tokens_per_second_per_chip
    return {
        "program": name,
        "estimated": True,
        "remat": remat,
        "microbatches": microbatches,
        **facts,
        "maxtext_tokens_per_second_per_chip": theirs,
        "maxtext_setting": setting,
        "maxtext_from_this_run": False,
        "ratio": rate / theirs if rate and theirs else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help=f"programs that begin so, of {', '.join(PROGRAMS)}")
    options = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = "cpu"
    for name in PROGRAMS:
        if name.startswith(options.only):
            print(json.dumps(record(name)), flush=True)


if __name__ == "__main__":
    main()
