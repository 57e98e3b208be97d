"""`lemur plan --mode generate`: whether prefill and decode fit a TPU slice, and an estimate of their speed.

Axis legend: B batch, T prompt position, S cache slot.

It compiles the functions of infer/programs.py. Every time is an estimate.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from lemur_jax.common.errors import UserError
from lemur_jax.infer.batching import LANES
from lemur_jax.infer.programs import empty_rows, programs
from lemur_jax.infer.session import abstract_params
from lemur_jax.models import kv_cache
from lemur_jax.models.config import DecoderConfig
from lemur_jax.models.decoder import Compute
from lemur_jax.parallel.config import MeshConfig
from lemur_jax.parallel.mesh import make_mesh
from lemur_jax.parallel.rules import batch_shards, spec
from lemur_jax.plan.compile import Compiled, compile_program, device_bytes
from lemur_jax.plan.plan import Plan, estimate_cost, format_plan, program_plan
from lemur_jax.plan.topologies import Slice, described_devices

# Stop ids of a row.
STOPS = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class GeneratePlan:
    """The cost of generation on a slice.

    Attributes:
      dtype, batch, prompt_length, cache_length: the arguments.
      prefill, decode: the two programs; the HBM has the kinds parameters, kv_cache and temporaries. The time of
        `prefill` is that of one chunk of each prompt, the time of `decode` that of one token for each sequence.
    """

    dtype: str
    batch: int
    prompt_length: int
    cache_length: int
    prefill: Plan
    decode: Plan

    @property
    def fits(self) -> bool:
        return self.prefill.fits and self.decode.fits


def plan_generate(
    model: DecoderConfig,
    layout: MeshConfig,
    tpu: Slice,
    *,
    batch: int,
    prompt_length: int,
    cache_length: int,
    dtype: str = "bfloat16",
) -> GeneratePlan:
    """Compiles prefill and decode of a model for a slice, and estimates their time.

    Args:
      model: the decoder.
      layout: its mesh.
      tpu: the slice, from `topologies.find_slice`.
      batch: B, sequences at a time.
      prompt_length: T.
      cache_length: S, prompt and answer together.
      dtype: of parameters, activations and cache.

    Raises:
      UserError: impossible lengths, or a mesh that does not fit the slice, the model or the batch.
    """
    mesh = make_mesh(layout, described_devices(tpu))
    _check(model, mesh, batch, prompt_length, cache_length)
    params = abstract_params(model, mesh, dtype)
    functions = programs(model, Compute(dtype=dtype, mesh=mesh))
    cache = _with_shardings(jax.eval_shape(lambda: functions.empty(batch, cache_length)), mesh, kv_cache.AXES)
    rows = _with_shardings(empty_rows(batch, cache_length, STOPS), mesh)
    sizes = {"parameters": device_bytes(params), "kv_cache": device_bytes(cache)}
    chunk = min(prompt_length, LANES)
    tokens = _with_shardings(jax.ShapeDtypeStruct((batch, chunk), jnp.int32), mesh)
    start = _with_shardings(jax.ShapeDtypeStruct((batch,), jnp.int32), mesh)
    flags = _with_shardings(jax.ShapeDtypeStruct((batch,), jnp.bool_), mesh)
    scalar = jax.ShapeDtypeStruct((), jnp.int32, sharding=NamedSharding(mesh, jax.sharding.PartitionSpec()))
    prefill = compile_program(functions.prefill, params, cache, tokens, start, flags, what="prefill")
    decode = compile_program(functions.decode, params, cache, rows, flags, scalar, scalar, what="decode")
    return GeneratePlan(
        dtype=dtype,
        batch=batch,
        prompt_length=prompt_length,
        cache_length=cache_length,
        prefill=_phase(prefill, sizes, tpu, mesh, batch * chunk),
        decode=_phase(decode, sizes, tpu, mesh, batch),
    )


def _check(model: DecoderConfig, mesh: Mesh, B: int, T: int, S: int) -> None:
    """Refuses impossible lengths and a batch that the mesh does not divide."""
    if not 0 < T < S <= model.max_position_embeddings:
        raise UserError(
            f"--prompt-length {T} must be above 0 and below --cache-length {S}, and that at most"
            f" config.model.max_position_embeddings {model.max_position_embeddings}"
        )
    shards = batch_shards(mesh)
    if mesh.shape["sequence"] > 1 or B < 1 or B % shards:
        raise UserError(
            f"--batch {B} must be a multiple of {shards}, the product of config.mesh.data, fsdp and expert,"
            f" and config.mesh.sequence {mesh.shape['sequence']} must be 1"
        )


def _with_shardings(tree: Any, mesh: Mesh, axes: tuple[str, ...] = ("batch", "width")) -> Any:
    """The abstract arrays with the shardings of these logical axes."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec(mesh, axes[: leaf.ndim], leaf.shape))
        ),
        tree,
    )


def _phase(compiled: Compiled, sizes: dict[str, int], tpu: Slice, mesh: Mesh, tokens: int) -> Plan:
    """The plan of prefill or decode: at least the time to read parameters and cache once at the HBM's bandwidth."""
    # The loop of decode ends when every sequence has ended; one turn of it is one token.
    estimate = estimate_cost(compiled, tpu, mesh, uncounted=1)
    if estimate:
        waiting = sum(sizes.values()) / tpu.generation.bandwidth - estimate.seconds
        if waiting > 0:
            estimate.compute["waiting for HBM"] = waiting
            estimate.seconds += waiting
    return program_plan(compiled, estimate, tpu, mesh, sizes, tokens)


def format_generate_plan(plan: GeneratePlan) -> str:
    """The plan as text."""
    if plan.fits:
        summary = (
            f"ESTIMATED {plan.prefill.tokens_per_second:,.0f} prompt tokens/s and"
            f" {plan.decode.tokens_per_second:,.0f} generated tokens/s, all sequences together (not measured)"
        )
    else:
        summary = "use a larger --config.mesh.tensor or --topology, or a smaller --batch or --cache-length"
    return (
        f"{plan.batch} sequences, prompts of {plan.prompt_length}, cache of {plan.cache_length}, {plan.dtype}\n\n"
        f"prefill on {format_plan(plan.prefill)}\n\ndecode on {format_plan(plan.decode)}\n\n{summary}"
    )
