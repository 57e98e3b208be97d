"""Compares the planner's estimates with published training steps on TPUs.

    python benchmarks/calibration.py                    # all: some minutes a row, 2 to 3 GiB
    python benchmarks/calibration.py --only v5e

Each row plans this package's step for the same model shape, batch, mesh and nearest rematerialization, and compares
tokens/s/chip, or MFU if only that is published. MFU counts attention in full, as MaxText and Google's v6e tables do; of
the tpu7x tables, which count it causal, only rates are used. **The published step is another program**, so the
difference combines both programs and the cost model. Prints one line and one JSON record per row.

Not included: Llama-3.1-70B on v6e-32 (921 tokens/s/chip), whose parameters are bfloat16; here they are float32.
"""

import argparse
import dataclasses
import json
import os
import statistics

from lemur_jax.config import RunConfig, replace
from lemur_jax.models.config import DecoderConfig
from lemur_jax.models.presets import preset
from lemur_jax.parallel.compiler_flags import SPARSECORE_SUMS

_MAXTEXT = "github.com/AI-Hypercomputer/maxtext/blob/main/"
_TPU_RECIPES = "github.com/AI-Hypercomputer/tpu-recipes/tree/main/training/"
_RECIPES = _TPU_RECIPES + "trillium/"
_IRONWOOD = _TPU_RECIPES + "ironwood"
_VMEM = ("xla_tpu_scoped_vmem_limit_kib=65536",)
_LATE_FETCHES = "xla_tpu_pipeline_memory_host_transfers=false"  # on for v4 (parallel/compiler_flags.py)
# SparseCores of tpu7x sum the gradients.
_SUMS = (*_VMEM, *SPARSECORE_SUMS)
_PROJECTIONS = "published: query, key and value offloaded; here: recomputed"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Published:
    """A published figure, and the nearest config here.

    Attributes:
      name, topology: the model and the slice.
      model: fields of DecoderConfig.
      rows: rows per chip and microbatch.
      length: T.
      remat: the nearest policy.
      tensor, sequence: mesh axes; the rest is fsdp.
      blocks: of the attention kernels, forward and backward; 0: the default.
      loss_chunk: positions whose logits exist at a time.
      moments: dtype of first moments.
      products: dtype of products with weights, where it is not bfloat16.
      options: compiler options, as published.
      mfu: published, with full attention; 0: see `rate`.
      rate: published tokens/s/chip.
      source: where it is published.
      note: known differences.
    """

    name: str
    topology: str
    model: dict
    rows: float
    length: int
    remat: str
    tensor: int = 1
    sequence: int = 1
    blocks: tuple[int, int] = (0, 0)
    loss_chunk: int = 512
    moments: str = "float32"
    products: str = ""
    options: tuple[str, ...] = ()
    mfu: float = 0.0
    rate: float = 0.0
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
        note="published: mlp of two matrices of width 24,576; here: three of 16,384, the same parameters and FLOPs",
    ),
    Published(
        name="16B", topology="v5e-256", model=shape(4096, 28_672, 32, 64), rows=6, length=2048, remat="full",
        mfu=0.611, source=_MAXTEXT + "MaxText/configs/v5e/README.md, 16b.sh",
    ),
    Published(
        name="Llama-2-70B", topology="v5e-256", model=preset("llama2_70b").to_dict(), rows=2, length=2048,
        remat="offload_attention", mfu=0.57,
        source=_MAXTEXT + "getting_started/Run_Llama2.md, MaxText/configs/v5e/llama2_70b.sh",
        note="published: query, key and value offloaded; here: the layer's input",
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
        note="published: layer input and projections offloaded, kernel blocks of 2048; here: recomputed",
    ),
    Published(
        name="Llama-2-70B", topology="v6e-256", model=preset("llama2_70b").to_dict(), rows=2, length=4096,
        remat="full", mfu=402.3 / 918, source=_RECIPES + "Llama2-70B-MaxText/README.md",
        note=_PROJECTIONS + "; all-reduces on SparseCores",
    ),
    Published(
        name="52B", topology="v4-384", model=shape(12_288, 32_768, 32, 32, head_dim=256), rows=7, length=2048,
        remat="full", mfu=0.589, source=_MAXTEXT + "MaxText/configs/v4/README.md, 52b.sh",
        note="published: mlp of two matrices of width 49,152; here: three of 32,768",
    ),
    Published(
        name="Llama-2-70B", topology="v5p-1024", model=preset("llama2_70b").to_dict(), rows=2, length=4096,
        remat="attention_all", options=_VMEM, rate=706.0, source="github.com/apple/axlearn, README",
    ),
    Published(
        name="Llama-3.1-405B", topology="v5p-1024", model=preset("llama3.1_405b").to_dict(), rows=2, length=8192,
        remat="offload_full", rate=124.6, source=_TPU_RECIPES + "v5p/Llama3.1-405B-MaxText",
    ),
    Published(
        name="Llama-3.1-8B", topology="v6e-64", model=preset("llama3.1_8b").to_dict(), rows=5, length=8192,
        remat="attention", rate=7247.0, source=_RECIPES + "Llama3.1-8B-MaxText",
    ),
    *(
        Published(
            name="Llama-3.1-70B", topology=topology, model=preset("llama3.1_70b").to_dict(), rows=rows, length=8192,
            remat="offload_full", rate=rate, source=_RECIPES + "Llama3.1-70B-MaxText", note=_PROJECTIONS,
        )
        for topology, rows, rate in (("v6e-64", 2, 876.7), ("v6e-128", 4, 942.0), ("v6e-256", 5, 960.2))
    ),
    *(
        Published(
            name="Llama-3.1-70B" + suffix, topology=topology, model=preset("llama3.1_70b").to_dict(), rows=4,
            length=8192, remat="attention_all", moments="bfloat16", products=products, options=options, rate=rate,
            loss_chunk=2048, source=_IRONWOOD,
        )
        for topology, suffix, products, options, rate in (
            ("tpu7x-128", "", "", _VMEM, 2687.0),
            ("tpu7x-512", "", "", _VMEM, 2670.6),
            ("tpu7x-128", " fp8", "float8_per_tensor", _SUMS, 4127.6),
        )
    ),
    *(
        Published(
            name="Llama-3.1-405B" + suffix, topology="tpu7x-512", model=preset("llama3.1_405b").to_dict(), rows=6,
            length=8192, remat="offload_full", moments="bfloat16", products=products, options=(*_SUMS, _LATE_FETCHES),
            rate=rate, source=_IRONWOOD, note=note,
        )
        for suffix, products, rate, note in (
            ("", "", 499.8, "published: key and value kept, the mlp's output offloaded too"),
            (" fp8", "float8_per_tensor", 763.5, ""),
        )
    ),
    Published(
        name="Llama-3.1-70B 128k", topology="tpu7x-512", model=preset("llama3.1_70b").to_dict(), rows=0.25,
        length=131_072, remat="attention", sequence=8, blocks=(0, 4096), loss_chunk=16_384,
        options=_SUMS, rate=963.0, source=_IRONWOOD, note="published: query, key, value and the mlp's output kept too",
    ),
)  # fmt: skip


def record(row: Published) -> dict:
    """Plans the step of one row."""
    from lemur_jax.plan import topologies
    from lemur_jax.plan.plan import GIB, plan

    options = {
        "data.sequence_length": row.length,
        "train.batch_rows": int(row.rows * topologies.find_slice(row.topology).chips),
        "mesh.tensor": row.tensor,
        "mesh.sequence": row.sequence,
        "optimizer.moments_dtype": row.moments,
        "compute.remat": row.remat,
        "compute.attention_blocks": row.blocks,
        "compute.loss_chunk": row.loss_chunk,
        "compute.product_dtype": row.products,
        "compute.compiler_options": row.options,
    }
    config = replace(RunConfig(model=DecoderConfig(**row.model)), options)
    made = plan(config, row.topology)
    published, estimated = (
        (row.rate, made.tokens_per_second_per_chip) if row.rate else (row.mfu, made.mfu_full_attention)
    )
    difference = estimated / published - 1 if estimated else None
    if estimated is None:
        print(f"{row.name:<19}{row.topology:<10} no estimate: {made.hbm_bytes_per_chip / GIB:.1f} GiB")
    else:
        unit = ",.0f" if row.rate else ".1%"
        print(
            f"{row.name:<19}{row.topology:<10} published {published:{unit}}, estimated {estimated:{unit}},"
            f" {difference:+.0%}; {made.step_seconds:.2f} s; {row.source}"
        )
    keep = ("fits", "step_seconds", "tokens_per_second_per_chip", "mfu", "mfu_full_attention", "parts")
    keep += ("hbm_bytes_per_chip", "compile_seconds", "versions")
    facts = dict(
        name=row.name, topology=row.topology, source=row.source, note=row.note, difference=difference
    )
    facts |= dict(published_mfu=row.mfu or None, published_rate=row.rate or None)
    return facts | {key: getattr(made, key) for key in keep}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", default="", help="rows whose `slice model` begins with this, e.g. v5p or 'v5e-256 16B'"
    )
    options = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = "cpu"
    errors: dict[str, list[float]] = {}
    for row in PUBLISHED:
        if f"{row.topology} {row.name}".startswith(options.only):
            facts = record(row)
            print(json.dumps(facts), flush=True)
            if facts["difference"] is not None:
                errors.setdefault(row.topology.partition("-")[0], []).append(facts["difference"])
    for generation, found in errors.items():
        print(_summary(generation, found))
    print(_summary("all", [error for found in errors.values() for error in found]))


def _summary(name: str, errors: list[float]) -> str:
    """Mean, spread and range of the differences."""
    if not errors:
        return f"{name}: no row"
    sizes = statistics.mean(abs(error) for error in errors)
    return (
        f"{name}: {len(errors)} rows, estimated / published - 1: mean {statistics.mean(errors):+.1%}, standard"
        f" deviation {statistics.pstdev(errors):.1%}, mean absolute {sizes:.1%}, from {min(errors):+.1%} to"
        f" {max(errors):+.1%}"
    )


if __name__ == "__main__":
    main()
