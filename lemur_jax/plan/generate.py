"""`lemur plan --mode generate`: whether prefill and decode fit a TPU slice, and an estimate of their speed.

Axis legend: B batch, T prompt position, S cache slot, J stop ids.

It compiles the functions of infer/programs.py with greedy sampling. Every time is an estimate.
"""

import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from lemur_jax.common.errors import UserError
from lemur_jax.config import RunConfig
from lemur_jax.infer.programs import Rows, programs
from lemur_jax.infer.session import abstract_params
from lemur_jax.models import kv_cache
from lemur_jax.models.config import LlamaConfig
from lemur_jax.models.llama import Compute
from lemur_jax.parallel.mesh import make_mesh
from lemur_jax.parallel.rules import spec
from lemur_jax.plan import cost, hlo
from lemur_jax.plan.compile import Compiled, compile_program, device_bytes, largest_arrays
from lemur_jax.plan.plan import format_largest, format_memory, format_mesh, hbm_by_kind, slice_name
from lemur_jax.plan.topologies import Slice, described_devices, find_slice

# Stop ids of a row.
STOPS = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Phase:
    """Prefill, or one step of decode.

    Attributes:
      fits, verdict, compile_seconds: the compiler's answer.
      hbm_bytes_per_chip: most in use at a time.
      hbm: bytes a chip by kind: parameters, kv_cache, temporaries (the rest).
      seconds: estimated, the larger of the next two; for decode, of one token for each sequence.
      scheduled_seconds: the compiler's cycles and exposed transfers.
      hbm_seconds: parameters and cache read once at the published bandwidth.
      exposed_seconds: the part of `scheduled_seconds` that waits for the network.
    """

    fits: bool
    verdict: str
    compile_seconds: float
    hbm_bytes_per_chip: int
    hbm: dict[str, int]
    seconds: float | None = None
    scheduled_seconds: float | None = None
    hbm_seconds: float | None = None
    exposed_seconds: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class GeneratePlan:
    """The cost of generation on a slice.

    Attributes:
      topology, slices, chips, mesh: the slice and the sizes of the mesh axes.
      dtype, batch, prompt_length, cache_length: the arguments.
      fits: whether both phases fit.
      hbm_limit_bytes_per_chip: what a program may use.
      largest_buffers: [bytes a chip, description], largest first.
      prefill, decode: the two phases.
      prefill_tokens_per_second, decode_tokens_per_second: of the whole batch.
    """

    topology: str
    slices: int
    chips: int
    mesh: dict[str, int]
    dtype: str
    batch: int
    prompt_length: int
    cache_length: int
    fits: bool
    hbm_limit_bytes_per_chip: int
    largest_buffers: list[list[Any]]
    prefill: Phase
    decode: Phase
    prefill_tokens_per_second: float | None = None
    decode_tokens_per_second: float | None = None

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2)


def plan_generate(
    config: RunConfig,
    topology: str,
    *,
    slices: int = 1,
    batch: int,
    prompt_length: int,
    cache_length: int,
    dtype: str = "bfloat16",
) -> GeneratePlan:
    """Compiles prefill and decode of a config's model on its mesh, and estimates their time.

    Args:
      config: model and mesh are read, nothing else.
      topology, slices: as for `plan`.
      batch: B, sequences at a time.
      prompt_length: T.
      cache_length: S, prompt and answer together.
      dtype: of parameters, activations and cache.

    Raises:
      UserError: impossible lengths, or a mesh that does not fit the slice, the model or the batch.
    """
    model = config.model
    tpu = find_slice(topology, slices)
    mesh = make_mesh(config.mesh, described_devices(tpu))
    _check(model, mesh, batch, prompt_length, cache_length)
    params = abstract_params(model, mesh, dtype)
    tokens, rows = _inputs(mesh, batch, prompt_length)
    run = programs(model, Compute(dtype=dtype, mesh=mesh))
    new_slots = cache_length - prompt_length
    state = jax.eval_shape(
        lambda params, tokens, rows: run.prefill(params, tokens, rows, {}, new_slots=new_slots)[0],
        params,
        tokens,
        rows,
    )
    state = _placed_state(state, mesh)
    sizes = {"parameters": device_bytes(params), "kv_cache": device_bytes(state.cache)}
    steps = jax.ShapeDtypeStruct((), jnp.int32, sharding=NamedSharding(mesh, jax.sharding.PartitionSpec()))
    prefill = _phase(
        compile_program(run.prefill, params, tokens, rows, {}, new_slots=new_slots, what="prefill"),
        sizes,
        tpu,
        mesh,
    )
    decode = _phase(compile_program(run.decode, params, state, {}, steps, what="decode"), sizes, tpu, mesh)
    per_chip = tpu.generation.devices_per_chip
    largest = largest_arrays({"params": params, "cache": state.cache}, 8)
    return GeneratePlan(
        topology=topology,
        slices=slices,
        chips=tpu.chips,
        mesh=dict(mesh.shape),
        dtype=dtype,
        batch=batch,
        prompt_length=prompt_length,
        cache_length=cache_length,
        fits=prefill.fits and decode.fits,
        hbm_limit_bytes_per_chip=tpu.generation.hbm * per_chip,
        largest_buffers=[[size * per_chip, what] for size, what in largest],
        prefill=prefill,
        decode=decode,
        prefill_tokens_per_second=batch * prompt_length / prefill.seconds if prefill.seconds else None,
        decode_tokens_per_second=batch / decode.seconds if decode.seconds else None,
    )


def _check(model: LlamaConfig, mesh: Mesh, B: int, T: int, S: int) -> None:
    """Refuses impossible lengths and a batch that the mesh does not divide."""
    if not 0 < T < S <= model.max_position_embeddings:
        raise UserError(
            f"--prompt-length {T} must be below --cache-length {S}, and that at most"
            f" config.model.max_position_embeddings {model.max_position_embeddings}"
        )
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    if mesh.shape["sequence"] > 1 or B < 1 or B % ways:
        raise UserError(
            f"--batch {B} must be a multiple of {ways}, the product of config.mesh.data and config.mesh.fsdp,"
            f" and config.mesh.sequence {mesh.shape['sequence']} must be 1"
        )


def _inputs(mesh: Mesh, B: int, T: int) -> tuple[Any, Rows]:
    """Abstract tokens int32 [B, T] and rows, placed as infer/generate.py places them."""

    def abstract(*shape: int, dtype=jnp.int32):
        return _struct(jax.ShapeDtypeStruct(shape, dtype), mesh, ("batch", "width")[: len(shape)])

    names = ("token", "position", "prompt_length", "remaining")
    per_row = {name: abstract(B) for name in names}
    rows = Rows(**per_row, seed=abstract(B, dtype=jnp.uint32), stop_ids=abstract(B, STOPS))
    return abstract(B, T), rows


def _struct(leaf, mesh: Mesh, axes: tuple[str, ...]) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(
        leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec(mesh, axes, leaf.shape))
    )


def _placed_state(state, mesh: Mesh):
    """The abstract state between two dispatches with the shardings that prefill leaves it in."""
    cache = jax.tree.map(lambda leaf: _struct(leaf, mesh, kv_cache.AXES), state.cache)
    others = dataclasses.replace(state, cache=None)
    placed = jax.tree.map(lambda leaf: _struct(leaf, mesh, ("batch", "width")[: leaf.ndim]), others)
    return dataclasses.replace(placed, cache=cache)


def _phase(compiled: Compiled, sizes: dict[str, int], tpu: Slice, mesh: Mesh) -> Phase:
    facts: dict[str, Any] = {}
    if compiled.hlo:
        network = cost.Network(tpu, list(mesh.devices.flat))
        # The loop of decode ends when every sequence has ended; one turn of it is one token.
        estimate = cost.Estimator(hlo.parse(compiled.hlo), network, uncounted=1).run()
        reading = sum(sizes.values()) / tpu.generation.bandwidth
        facts = dict(
            seconds=max(estimate.seconds, reading),
            scheduled_seconds=estimate.seconds,
            hbm_seconds=reading,
            exposed_seconds=estimate.exposed,
        )
    return Phase(
        fits=compiled.fits,
        verdict=compiled.verdict,
        compile_seconds=compiled.seconds,
        hbm_bytes_per_chip=compiled.peak_bytes * tpu.generation.devices_per_chip,
        hbm=hbm_by_kind(sizes, compiled, tpu),
        **facts,
    )


def format_generate_plan(plan: GeneratePlan) -> str:
    """The plan as text."""
    lines = [
        f"{slice_name(plan.topology, plan.slices)}: {plan.chips} chips, mesh {format_mesh(plan.mesh)}; {plan.batch}"
        f" sequences, prompts of {plan.prompt_length}, cache of {plan.cache_length}, {plan.dtype}",
    ]
    for name, phase in (("prefill", plan.prefill), ("decode", plan.decode)):
        verdict, *kinds = format_memory(
            phase.fits, phase.hbm_bytes_per_chip, plan.hbm_limit_bytes_per_chip, phase.hbm
        )
        lines += ["", f"{name}: {verdict}; compiled in {phase.compile_seconds:.0f} s", *kinds]
        if phase.seconds is None:
            lines.append("  " + phase.verdict.strip().splitlines()[0])
            continue
        lines.append(
            f"  ESTIMATED {1e3 * phase.seconds:.1f} ms (scheduled {1e3 * phase.scheduled_seconds:.1f}, of which"
            f" {1e3 * phase.exposed_seconds:.1f} wait for the network; reading parameters and cache"
            f" {1e3 * phase.hbm_seconds:.1f})"
        )
    if not plan.fits:
        lines += ["", "the largest buffers a chip:", *format_largest(plan.largest_buffers), ""]
        lines.append(
            "use a larger --config.mesh.tensor or --topology, or a smaller --batch or --cache-length"
        )
    else:
        lines += [
            "",
            f"ESTIMATED {plan.prefill_tokens_per_second:,.0f} prompt tokens/s and {plan.decode_tokens_per_second:,.0f}"
            " generated tokens/s, all sequences together (not measured)",
        ]
    return "\n".join(lines)
