"""Cycles of the splash attention kernels, which the compiler does not count.

The kernel visits blocks of scores; a visit that the causal mask skips still costs the overhead of a grid step. Cycles
per visit are bundles of the compiler's static schedule of the kernel (`*final_bundles.txt` of
`LIBTPU_INIT_ARGS="--xla_jf_dump_to=DIR --xla_jf_dump_llo_text=true"`; one bundle, one cycle), taken with libtpu 0.0.52
at head width 128 and scaled by the area of the block.
"""

import dataclasses
import math
import re
from collections.abc import Iterable

from lemur_jax.plan import hlo
from lemur_jax.plan.topologies import Generation
from lemur_jax.telemetry.flops import chip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kernel:
    """Cycles on one core of each square block of scores, by its side, at head width 128; and of each grid step."""

    blocks: dict[int, int]
    step: int


# (generation, pass) -> cycles. "fused" is the backward pass in one kernel. The blocks are bundles of the kernel's body.
# The steps of v4 and v5e come from whole schedules, those of the others are assumed.
KERNELS: dict[tuple[str, str], Kernel] = {
    ("v4", "fwd"): Kernel(blocks={512: 1807, 1024: 7921}, step=290),
    ("v4", "dq"): Kernel(blocks={512: 2072, 1024: 7905}, step=353),
    ("v4", "dkv"): Kernel(blocks={512: 2604, 1024: 10633}, step=462),
    ("v4", "fused"): Kernel(blocks={1024: 12212}, step=462),
    ("v5e", "fwd"): Kernel(blocks={512: 1178, 1024: 4554}, step=73),
    ("v5e", "dq"): Kernel(blocks={512: 1504, 1024: 5814}, step=166),
    ("v5e", "dkv"): Kernel(blocks={512: 1909, 1024: 7425}, step=63),
    ("v5e", "fused"): Kernel(blocks={1024: 8895}, step=63),
    ("v5p", "fwd"): Kernel(blocks={512: 1178}, step=150),
    ("v5p", "dq"): Kernel(blocks={1024: 5842}, step=150),
    ("v5p", "dkv"): Kernel(blocks={1024: 7340}, step=150),
    ("v5p", "fused"): Kernel(blocks={1024: 9064}, step=150),
    ("v6e", "fwd"): Kernel(blocks={512: 989}, step=100),
    ("v6e", "dq"): Kernel(blocks={1024: 4277}, step=100),
    ("v6e", "dkv"): Kernel(blocks={1024: 5020}, step=100),
    ("v6e", "fused"): Kernel(blocks={1024: 6154}, step=100),
    ("tpu7x", "fwd"): Kernel(blocks={512: 975}, step=100),
    ("tpu7x", "dq"): Kernel(blocks={1024: 4389}, step=100),
    ("tpu7x", "dkv"): Kernel(blocks={1024: 4631}, step=100),
    ("tpu7x", "fused"): Kernel(blocks={1024: 5625}, step=100),
}


# Share of the peak that grouped products reach, assumed: tiles have 128 rows and do not span experts.
GROUPED_EFFICIENCY = 0.7


def grouped_cycles(
    each: hlo.Instruction, generation: Generation, inside: Iterable[hlo.Instruction] = ()
) -> float | None:
    """Cycles of a grouped product (`jax.lax.ragged_dot`) at an assumed share of the peak; None for other instructions.

    It is a kernel on v5p. On v6e it is a fusion, whose cycles by the compiler are wrong: 0.5 s for a product of 1 ms.
    All rows of the buffer count; with a mesh axis `expert` some of them are empty in a run.

    Args:
      inside: the instructions of a fusion.
    """
    if each.opcode == "custom-call" and each.name.startswith("ragged-dot-none"):
        left, right = _operand_matrices(each)[:2]
        flops = 2.0 * math.prod(left) * right[-1]
    elif each.opcode == "fusion" and '"is_ragged_dot":true' in each.attributes:
        shapes = [each.shape, *(instr.shape for instr in inside if instr.opcode == "parameter")]
        arrays = _matrices(" ".join(shapes))
        # The result or an operand is [experts, K, N], the others begin with the rows.
        weights = next(sizes for sizes in arrays if len(sizes) == 3)
        rows = next(sizes for sizes in arrays if len(sizes) == 2)[0]
        flops = 2.0 * rows * weights[1] * weights[2]
    else:
        return None
    return flops / (chip(generation.device_kind).flops_per_device * GROUPED_EFFICIENCY) * generation.clock


def _operand_matrices(kernel: hlo.Instruction) -> list[tuple[int, ...]]:
    """Sizes of a kernel's operands of floats; its layout constraints list them."""
    listed = kernel.attributes.partition("operand_layout_constraints=")[2]
    return _matrices(listed.partition("}, frontend_attributes")[0])


def _matrices(text: str) -> list[tuple[int, ...]]:
    """Sizes of the arrays of floats in shapes' text."""
    return [sizes for dtype, sizes in hlo.shapes(text) if dtype in ("bf16", "f32")]


def cycles(each: hlo.Instruction, generation: Generation) -> float | None:
    """Cycles of one execution of a splash kernel; None if `each` is another instruction.

    Raises:
      ValueError: a kernel whose shapes cannot be read.
    """
    # A mapped kernel may be called `vmap_vmap_splash_mqa_dkv...`.
    match = re.search(r"splash_(?:mha|mqa)_(fwd|dq|dkv)", each.name)
    if not each.is_kernel or not match:
        return None
    phase = match[1]
    matrices = _operand_matrices(each)  # the first two are q [..., T, N] and k [..., S, N]
    suffix = "" if phase == "fwd" else f"_{phase}"
    sizes = [re.search(rf'{key}{suffix}\\": (\d+)', each.attributes) for key in ("block_q", "block_kv")]
    if len(matrices) < 2 or None in sizes:
        raise ValueError(f"cannot read the shapes of the kernel {each.name}")
    (*heads, T, N), S = matrices[0], matrices[1][-2]
    bq, bkv = (int(size[1]) for size in sizes)
    # dk, dv and with "fused" dq; JAX 0.10 puts the scratch space, as many arrays again, among the results.
    if phase == "dkv" and len(hlo.shapes(each.shape)) in (3, 6):
        phase = "fused"
    kernel = KERNELS[generation.name, phase]
    steps = (T // bq) * (S // bkv)
    # Blocks that touch the causal triangle.
    visits = sum(-(-((row + 1) * bq) // bkv) for row in range(T // bq))
    nearest = min(kernel.blocks, key=lambda side: abs(math.log(bq * bkv / side**2)))
    block = kernel.blocks[nearest] * bq * bkv / nearest**2 * max(N, 128) / 128
    # The two cores of a megacore device share the heads.
    cores = 2 if generation.chip_config == "megacore" and math.prod(heads) > 1 else 1
    return math.prod(heads) * (visits * block + steps * kernel.step) / cores
