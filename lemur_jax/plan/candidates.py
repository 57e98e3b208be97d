"""What a search may compile: layouts and refinements, and what they are expected to cost.

A layout is a mesh, a rematerialization policy, a share of the mlp's gate and a number of microbatches. Its cost is
predicted from its analytic bound and from how far the most similar compiled program was above its own bound. A
refinement is a value that the bound does not know, e.g. the blocks of the attention kernels.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lemur_jax.models.config import KEEP_GATE, ComputeConfig
from lemur_jax.models.remat import POLICIES
from lemur_jax.parallel.compiler_flags import SPARSECORE_SUMS, compiler_options, exchanges_gradients
from lemur_jax.parallel.config import MeshConfig
from lemur_jax.parallel.mesh import AXES
from lemur_jax.plan import analytic
from lemur_jax.plan.plan import Plan
from lemur_jax.plan.topologies import Slice

# Sizes of the mesh axis `tensor`; beyond eight the sums of activations cost more than they save.
TENSOR_WAYS = (1, 2, 4, 8)
# Rows are cut into pieces of at least this many positions; shorter pieces gather keys and values for too little work.
SHORTEST_PIECE = 2048
SHARES = (0.0, 0.25, 0.5, 0.625, 0.75)
# What a program needs over its bounds if none like it was compiled; Llama-2-70B on v5p waits for the host 2 of 14 s.
_USUAL_MEMORY, _USUAL_TIME, _USUAL_TIME_OFFLOADING = 1.15, 1.2, 1.4
# What a full HBM is expected to cost: the scheduler overlaps less. Of equal bounds the smaller program comes first.
COST_OF_MEMORY = 0.05
# What a split gate costs: the gradient of its input is a sum of four products, not two (0.5 of 37.5 s on v4-512).
_COST_OF_SPLIT = 0.012

OPTIONS = "compute.compiler_options"
REMAT = "compute.remat"
GATE_SHARE = "compute.gate_share"
_VMEM = ("xla_tpu_scoped_vmem_limit_kib=65536",)  # larger tiles; compiles up to four times longer
_ALL_REDUCES = ("xla_tpu_enable_async_all_to_all=false",)  # of gradients
_MORE_MEMORY = ("xla_tpu_scheduler_percent_shared_memory_limit=110",)  # that the scheduler may plan with
_FUSED_GATHERS = ("xla_tpu_enable_async_collective_fusion_fuse_all_gather=true",)  # v5e alone takes it
# (values of config keys, expected step time of the best with them). The factors are the best that each gave on any
# slice. Options of the compiler are added to those that are given.
REFINEMENTS: tuple[tuple[dict[str, Any], float], ...] = (
    ({OPTIONS: (*_VMEM, *SPARSECORE_SUMS), "compute.loss_chunk": 2048}, 0.86),
    ({"compute.loss_chunk": 0}, 0.985),
    ({OPTIONS: SPARSECORE_SUMS}, 0.985),
    ({OPTIONS: _VMEM}, 0.99),  # where all together did not help
    ({"compute.loss_chunk": 2048}, 0.99),
    ({OPTIONS: _ALL_REDUCES}, 0.99),
    ({OPTIONS: _MORE_MEMORY}, 0.99),
    ({"compute.attention_blocks": (1024, 0)}, 0.995),
    ({"compute.attention_blocks": (0, 2048)}, 0.995),
    ({"compute.attention_blocks": (0, 512)}, 0.995),
    ({"compute.attention_blocks": (1024, 512)}, 0.995),
    ({OPTIONS: _FUSED_GATHERS}, 0.995),
)
_REFINED_KEYS = ("compute.loss_chunk", "compute.attention_blocks", OPTIONS)

Changes = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Candidate:
    """Values of config keys, e.g. {"mesh.fsdp": 16}, and the lower bounds of their cost."""

    changes: Changes
    bound: analytic.Bound

    @property
    def layout(self) -> Changes:
        return {name: value for name, value in self.changes.items() if name not in _REFINED_KEYS}

    @property
    def refinement(self) -> Changes:
        return {name: value for name, value in self.changes.items() if name in _REFINED_KEYS}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trial(Candidate):
    """A compiled candidate: its plan, or the error."""

    plan: Plan | None = None
    error: str = ""

    @property
    def fits(self) -> bool:
        """Whether it fits and its time could be estimated."""
        return self.plan is not None and self.plan.step_seconds is not None

    @property
    def seconds(self) -> float:
        """Of a step, if it fits."""
        assert self.plan is not None
        assert self.plan.step_seconds is not None
        return self.plan.step_seconds

    @property
    def device_bytes(self) -> float:
        """HBM of a device, as in the bounds; a plan states that of a chip."""
        assert self.plan is not None
        return self.plan.hbm_bytes_per_chip * self.plan.chips / math.prod(self.plan.mesh.values())


def layout_changes(sizes: Sequence[int], compute: ComputeConfig, microbatches: int) -> Changes:
    """A layout as values of config keys; `sizes` are those of the axes in `parallel.mesh.AXES`."""
    return {
        **{f"mesh.{axis}": size for axis, size in zip(AXES, sizes, strict=True) if axis != "expert"},
        REMAT: compute.remat,
        "train.microbatches": microbatches,
        GATE_SHARE: compute.gate_share,
    }


def layouts(mesh: MeshConfig, rows: int, length: int, tpu: Slice) -> Iterator[Changes]:
    """Every possible mesh, policy, share and number of microbatches; the axis `expert` is that of `mesh`."""
    powers = [2**power for power in range(rows.bit_length()) if rows % 2**power == 0]
    pieces = range((length // SHORTEST_PIECE).bit_length())
    sequences = sorted({max(1, mesh.sequence), 1, *(2**power for power in pieces)})
    meshes = itertools.product(sequences, TENSOR_WAYS, range(tpu.slices, tpu.devices + 1, tpu.slices))
    for sequence, tensor, data in meshes:
        fsdp, rest = divmod(tpu.devices, tensor * data * sequence * mesh.expert)
        if rest or not fsdp:
            continue
        sizes = (data, fsdp, mesh.expert, sequence, tensor)
        for remat, microbatches, share in itertools.product(POLICIES, powers, SHARES):
            if not (share and remat in KEEP_GATE):
                compute = ComputeConfig(remat=remat, gate_share=share)
                yield layout_changes(sizes, compute, microbatches)


def refinements(best: Trial, compute: ComputeConfig, device_kind: str) -> Iterator[tuple[Candidate, float]]:
    """The best so far with the values of one of `REFINEMENTS`, if they change it; and its expected seconds.

    Args:
      compute: that of the config with which the search began.
      device_kind: of the slice; compiler options that are on there, or higher, are not tried.
    """
    for values, factor in REFINEMENTS:
        current = {
            name: best.changes.get(name, getattr(compute, name.removeprefix("compute."))) for name in values
        }
        refined = dict(values)
        if OPTIONS in values:
            added = values[OPTIONS]
            if not exchanges_gradients(device_kind, current[OPTIONS]):  # they are summed already
                added = tuple(option for option in added if option not in SPARSECORE_SUMS)
            refined[OPTIONS] = current[OPTIONS] + added
            old, new = (compiler_options(device_kind, each[OPTIONS]) for each in (current, refined))
            lowered = any(new[name] < value for name, value in old.items() if type(value) is int)
            if lowered or new == old:
                refined[OPTIONS] = current[OPTIONS]
        if changed := {name: value for name, value in refined.items() if value != current[name]}:
            yield Candidate(changes=best.changes | changed, bound=best.bound), best.seconds * factor


def likely_bytes(candidate: Candidate, trials: Sequence[Trial]) -> float:
    """HBM of a device: the bound, corrected by the most similar compiled program."""
    nearest = _nearest(candidate, [trial for trial in trials if trial.plan and trial.plan.hbm_bytes_per_chip])
    if nearest is None:
        return candidate.bound.bytes * _USUAL_MEMORY
    return _corrected(candidate.bound.bytes, nearest.bound.bytes, nearest.device_bytes, nearest, candidate)


def likely_seconds(candidate: Candidate, trials: Sequence[Trial]) -> float:
    """Step time: the bound, corrected by the most similar compiled program and by what refinements gave elsewhere."""
    nearest = _nearest(candidate, [trial for trial in trials if trial.fits])
    if nearest is None:
        usual = _USUAL_TIME_OFFLOADING if candidate.bound.host else _USUAL_TIME
        return _bound_seconds(candidate) * usual * _gain(candidate.refinement, trials)
    plain = nearest.seconds / _gain(nearest.refinement, trials)
    bounds = _bound_seconds(candidate), _bound_seconds(nearest)
    return _corrected(*bounds, plain, nearest, candidate) * _gain(candidate.refinement, trials)


def _bound_seconds(candidate: Candidate) -> float:
    return candidate.bound.likely_seconds * (1 + _COST_OF_SPLIT * bool(candidate.changes[GATE_SHARE]))


def _nearest(candidate: Candidate, trials: Sequence[Trial]) -> Trial | None:
    """The trial with the same policy and the most equal values of the layout.

    A program that offloads to the host is compared only with others that do.
    """

    def equal_values(trial: Trial) -> tuple[bool, int]:
        same = [name for name, value in candidate.layout.items() if trial.changes[name] == value]
        return REMAT in same, len(same)

    comparable = (trial for trial in trials if bool(trial.bound.host) == bool(candidate.bound.host))
    return max(comparable, key=equal_values, default=None)


def _corrected(
    bound: float, near_bound: float, near_value: float, near: Candidate, candidate: Candidate
) -> float:
    """The bound, corrected as the value of the near one differs from its bound.

    Another share of the gate alone adds what the bounds say; everything else scales.
    """
    if {**near.layout, GATE_SHARE: 0} == {**candidate.layout, GATE_SHARE: 0}:
        return near_value + bound - near_bound
    return bound * near_value / near_bound


def _gain(refinement: Changes, trials: Sequence[Trial]) -> float:
    """Step time with the refinement over that without it, for a layout that was compiled both ways; else 1."""
    for index, trial in enumerate(trials):
        if refinement and trial.fits and trial.refinement == refinement:
            earlier = (other for other in trials[:index] if other.fits and other.layout == trial.layout)
            if base := next(earlier, None):
                return trial.seconds / base.seconds * _gain(base.refinement, trials[:index])
    return 1.0


def reason_to_skip(candidate: Candidate, trials: Sequence[Trial]) -> str:
    """Why a candidate need not be compiled; "" if it must be."""
    bound = candidate.bound
    for trial in trials:
        if trial.fits and trial.device_bytes <= bound.bytes and trial.seconds <= bound.seconds:
            return "cannot beat one that was compiled"
        # A refined trial may have failed because of the refinement.
        alike = {**trial.changes, "train.microbatches": 0} == {**candidate.layout, "train.microbatches": 0}
        if alike and trial.plan and not trial.plan.fits and trial.bound.bytes <= bound.bytes:
            return "needs more than one that did not fit"
    return ""


def format_changes(changes: Mapping[str, Any]) -> str:
    """The values of a candidate, e.g. "fsdp 16, mlp, microbatches 2"."""
    sizes = [
        f"{name.removeprefix('mesh.')} {value}"
        for name, value in changes.items()
        if name.startswith("mesh.") and value > 1
    ]
    mesh = " ".join(sizes)
    words = [mesh or "one device", changes[REMAT], f"microbatches {changes['train.microbatches']}"]
    if changes.get(GATE_SHARE):
        words.append(f"gate_share {changes[GATE_SHARE]}")
    for name in ("compute.loss_chunk", "compute.attention_blocks"):
        if name in changes:
            words.append(f"{name.removeprefix('compute.')} {changes[name]}")
    return ", ".join([*words, *changes.get(OPTIONS, ())])
