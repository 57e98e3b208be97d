"""Compares searches of ten minutes with the best layout found by hand.

    python benchmarks/search.py [--minutes 10] [--only v5p]

Each search of `lemur plan --search` begins with the config of its row, not with the layout found by hand, and an empty
cache. All step times are estimates of the planner. A row uses two cores: run nothing else on a small machine.
"""

import argparse
import dataclasses
import json
import logging
import os
import pathlib
import tempfile
from typing import Any

from lemur_jax.config import RunConfig, load, replace
from lemur_jax.models.presets import preset
from lemur_jax.parallel.compiler_flags import SPARSECORE_SUMS

_CONFIGS = pathlib.Path(__file__).parent.parent / "configs"
_VMEM = "xla_tpu_scoped_vmem_limit_kib=65536"
_LLAMA3 = {"data.sequence_length": 8192, "train.batch_rows": 256, "optimizer.moments_dtype": "bfloat16"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """A config, the changes that define the task, and the best layout found by hand.

    Attributes:
      config: a file in configs/, or a preset with a default config.
      task: values that the search does not choose.
      by_hand: values of the best layout found by hand.
    """

    topology: str
    config: str
    task: dict[str, Any]
    by_hand: dict[str, Any]

    def start(self) -> RunConfig:
        """The config with which the search begins."""
        if self.config.endswith(".py"):
            return replace(load(str(_CONFIGS / self.config)), self.task)
        return replace(RunConfig(model=preset(self.config)), self.task)


ROWS = (
    Row(
        topology="v4-512", config="lemur_70b_pretrain.py", task={},
        by_hand={"compute.gate_share": 0.625, "compute.loss_chunk": 0},
    ),
    Row(
        topology="v5p-128", config="lemur_70b_pretrain.py", task={"train.batch_rows": 128},
        by_hand={
            "train.microbatches": 1, "compute.remat": "mlp", "compute.gate_share": 0.75,
            "compute.compiler_options": (_VMEM,),
        },
    ),
    Row(
        topology="v6e-256", config="lemur_70b_pretrain.py", task={"train.batch_rows": 512},
        by_hand={"train.microbatches": 1, "compute.remat": "full"},
    ),
    Row(
        topology="v6e-64", config="llama3.1_8b", task={"data.sequence_length": 4096, "train.batch_rows": 128},
        by_hand={"compute.remat": "attention_all"},
    ),
    Row(
        topology="tpu7x-128", config="llama3.1_70b", task=_LLAMA3,
        by_hand={
            "compute.remat": "attention_all", "compute.loss_chunk": 2048, "compute.compiler_options": (_VMEM,),
        },
    ),
    Row(
        topology="tpu7x-128", config="llama3.1_70b", task={**_LLAMA3, "compute.product_dtype": "float8_per_tensor"},
        by_hand={
            "compute.remat": "attention_all", "compute.loss_chunk": 2048,
            "compute.compiler_options": (_VMEM, *SPARSECORE_SUMS),
        },
    ),
    Row(topology="v4-32", config="lemur_7b_pretrain.py", task={}, by_hand={}),
    Row(
        topology="v5e-256", config="lemur_7b_pretrain.py", task={},
        by_hand={
            "train.microbatches": 2, "compute.remat": "attention_all", "compute.gate_share": 0.5,
            "compute.loss_chunk": 0,
        },
    ),
)  # fmt: skip


def record(row: Row, minutes: float) -> dict[str, Any]:
    """The result of a search, and the plan of the layout found by hand."""
    from lemur_jax.plan.candidates import format_changes
    from lemur_jax.plan.plan import GIB, plan
    from lemur_jax.plan.search import search

    start = row.start()
    with tempfile.TemporaryDirectory() as cache:
        found = search(start, row.topology, minutes=minutes, processes=2, cache=pathlib.Path(cache))
    by_hand = plan(replace(start, row.by_hand), row.topology)
    best = found.best
    facts = dict(topology=row.topology, config=row.config, task=row.task, by_hand_s=by_hand.step_seconds)
    facts |= dict(compiled=found.compiled, fit=sum(trial.fits for trial in found.trials))
    if best and best.plan:
        facts |= dict(search_s=best.seconds, over_by_hand=best.seconds / by_hand.step_seconds)
        facts |= dict(layout=format_changes(best.changes), hbm_gib=best.plan.hbm_bytes_per_chip / GIB)
        facts |= dict(tokens_per_second_per_chip=best.plan.tokens_per_second_per_chip)
    return facts


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--only", default="", help="rows whose `slice config` begins with this, e.g. v5p")
    options = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = "cpu"
    logging.basicConfig(format="%(message)s")
    logging.getLogger("lemur_jax").setLevel(logging.INFO)
    for row in ROWS:
        if f"{row.topology} {row.config}".startswith(options.only):
            print(json.dumps(record(row, options.minutes)), flush=True)


if __name__ == "__main__":
    main()
