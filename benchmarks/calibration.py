"""The planner's estimates against published steps of MaxText on TPUs that really ran.

    python benchmarks/calibration.py                    # all: some minutes a row, 2 to 3 GiB
    python benchmarks/calibration.py --only v5e

Each row puts our step of the same model shape, batch, mesh and nearest rematerialization through `lemur plan` and
compares the MFU (attention counted full, as the published figures do). **Their step is not ours**, so the difference is
that of two programs and of the cost model together. Prints a line and a JSON record a row.
"""

import argparse
import dataclasses
import json
import os
import statistics

from lemur_jax.config import RunConfig, replace
from lemur_jax.models.config import DecoderConfig
from lemur_jax.models.presets import preset

_MAXTEXT = "github.com/AI-Hypercomputer/maxtext/blob/main/"
_RECIPES = "github.com/AI-Hypercomputer/tpu-recipes/blob/main/training/trillium/"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Published:
    """One published figure and what of its config we can follow.

    Attributes:
      name, topology: the model and the slice.
      model: fields of DecoderConfig.
      rows: rows a chip in one pass.
      length: T.
      remat: our nearest policy.
      tensor: mesh axis; the rest is fsdp.
      mfu: published, attention counted full.
      source: where anyone can look it up.
      note: where our step differs knowingly.
    """

    name: str
    topology: str
    model: dict
    rows: int
    length: int
    remat: str
    tensor: int = 1
    mfu: float
    source: str
    note: str = ""


def shape(width: int, mlp: int, layers: int, heads: int, head_dim: int = 128) -> dict:
    """A Llama with as many key heads as query heads and Llama-2's vocabulary."""
    sizes = dict(hidden_size=width, intermediate_size=mlp, num_hidden_layers=layers, head_dim=head_dim)
    return preset("llama2_70b", **sizes, num_attention_heads=heads, num_key_value_heads=heads).to_dict()


# Sizes of "16B" and "32B" follow from base.yml and global_parameter_scale (MaxText/pyconfig.py).
PUBLISHED = (
    Published(
        name="22B", topology="v4-128", model=shape(6144, 16_384, 48, 24, head_dim=256), rows=13, length=2048,
        remat="full", mfu=0.567, source=_MAXTEXT + "MaxText/configs/v4/README.md, 22b.sh",
        note="their mlp is two matrices of width 24,576; ours three of 16,384, the same parameters and FLOPs",
    ),
    Published(
        name="16B", topology="v5e-256", model=shape(4096, 28_672, 32, 64), rows=6, length=2048, remat="full",
        mfu=0.611, source=_MAXTEXT + "MaxText/configs/v5e/README.md, 16b.sh",
    ),
    Published(
        name="Llama-2-70B", topology="v5e-256", model=preset("llama2_70b").to_dict(), rows=2, length=2048,
        remat="offload_attention", mfu=0.57,
        source=_MAXTEXT + "getting_started/Run_Llama2.md, MaxText/configs/v5e/llama2_70b.sh",
        note="theirs sends query, key and value to the host; ours the layer's input",
    ),
    Published(
        name="32B", topology="v5p-128", model=shape(8192, 28_672, 32, 64), rows=7, length=2048, remat="mlp_gate",
        tensor=4, mfu=0.7147, source=_MAXTEXT + "MaxText/configs/v5p/README.md, 32b.sh",
    ),
    Published(
        name="Llama-2-70B", topology="v5p-128", model=preset("llama2_70b").to_dict(), rows=4, length=4096,
        remat="attention_all", mfu=0.65,
        source=_MAXTEXT + "getting_started/Run_Llama2.md, MaxText/configs/v5p/llama2_70b.sh",
    ),
    Published(
        name="Llama-3.1-8B", topology="v6e-8", model=preset("llama3.1_8b").to_dict(), rows=3, length=8192,
        remat="full", mfu=413.4 / 918, source=_RECIPES + "Llama3.1-8B-MaxText/v6e-8/README.md",
        note="theirs sends layer input and projections to the host, ours computes them again; kernel blocks of 2048",
    ),
    Published(
        name="Llama-2-70B", topology="v6e-256", model=preset("llama2_70b").to_dict(), rows=3, length=4096,
        remat="full", mfu=402.3 / 918, source=_RECIPES + "Llama2-70B-MaxText/README.md",
        note="theirs sends query, key and value to the host, ours computes them again; all-reduces on SparseCores",
    ),
)  # fmt: skip


def record(row: Published) -> dict:
    """Plans our step for one row."""
    from lemur_jax.plan import topologies
    from lemur_jax.plan.plan import GIB, plan

    options = {
        "data.sequence_length": row.length,
        "train.batch_rows": row.rows * topologies.find_slice(row.topology).chips,
        "mesh.tensor": row.tensor,
        "compute.remat": row.remat,
    }
    config = replace(RunConfig(model=DecoderConfig(**row.model)), options)
    made = plan(config, row.topology)
    if made.step_seconds is None:
        print(f"{row.name:<13}{row.topology:<9} no estimate: {made.hbm_bytes_per_chip / GIB:.1f} GiB")
    else:
        print(
            f"{row.name:<13}{row.topology:<9} published {row.mfu:6.1%}, ours {made.mfu_full_attention:6.1%}"
            f" estimated, {made.mfu_full_attention / row.mfu - 1:+.0%}; {made.step_seconds:.2f} s; {row.source}"
        )
    keep = ("fits", "step_seconds", "tokens_per_second_per_chip", "mfu", "mfu_full_attention", "parts")
    keep += ("hbm_bytes_per_chip", "compile_seconds", "versions")
    facts = dict(
        name=row.name, topology=row.topology, published_mfu=row.mfu, source=row.source, note=row.note
    )
    return facts | {key: getattr(made, key) for key in keep}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", default="", help="rows whose `slice model` begins so, e.g. v5p or 'v5e-256 16B'"
    )
    options = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = "cpu"
    errors = []
    for row in PUBLISHED:
        if f"{row.topology} {row.name}".startswith(options.only):
            facts = record(row)
            print(json.dumps(facts), flush=True)
            if facts["mfu_full_attention"]:
                errors.append(facts["mfu_full_attention"] / row.mfu - 1)
    if len(errors) > 1:
        absolute = [abs(error) for error in errors]
        print(
            f"{len(errors)} rows, ours over published less one: mean {statistics.mean(errors):+.1%}, mean size"
            f" {statistics.mean(absolute):.1%}, largest {max(errors, key=abs):+.1%}"
        )


if __name__ == "__main__":
    main()
