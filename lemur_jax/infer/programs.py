"""Prefill and decode: the two functions that run on the devices.

Axis legend: B batch, T prompt position, S cache slot, V vocabulary, J stop ids, C tokens a dispatch.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lemur_jax.infer.sampling import Knobs, choose
from lemur_jax.models import decoder, kv_cache
from lemur_jax.models.config import DecoderConfig
from lemur_jax.models.decoder import Compute, Params
from lemur_jax.models.kv_cache import KVCache
from lemur_jax.parallel.rules import constrain

# The most tokens of one dispatch of decode.
CHUNK = 64


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Rows:
    """The state of each sequence.

    Attributes:
      token: int32 [B], the last one; its key is not in the cache yet.
      position: int32 [B], of that token in its sequence.
      prompt_length: int32 [B].
      remaining: int32 [B], tokens that may still be chosen; 0: finished.
      seed: uint32 [B].
      stop_ids: int32 [B, J], padded with -1.
      seen: bool [B, V], tokens so far; None without a repetition penalty.
    """

    token: jax.Array
    position: jax.Array
    prompt_length: jax.Array
    remaining: jax.Array
    seed: jax.Array
    stop_ids: jax.Array
    seen: jax.Array | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class State:
    """Between two dispatches: the cache, the slot int32 [] that comes next, the first slot int32 []
    that holds no prompt, and the rows."""

    cache: KVCache
    slot: jax.Array
    prompt_slots: jax.Array
    rows: Rows


@dataclasses.dataclass(frozen=True, kw_only=True)
class Programs:
    """The compiled pair.

    Attributes:
      prefill: (params, tokens int32 [B, T], rows, knobs, new_slots) -> (state, tokens int32 [B, 1],
        logprobs float32 [B, 1]). Chooses the first token; `new_slots` (static) are for generated tokens.
      decode: (params, state, knobs, steps) -> (state, tokens int32 [B, C], logprobs float32 [B, C]).
        Chooses `steps` ≤ C tokens, -1 where a sequence is finished. The old state is donated.
    """

    prefill: Callable[..., tuple[State, jax.Array, jax.Array]]
    decode: Callable[..., tuple[State, jax.Array, jax.Array]]


@functools.lru_cache(maxsize=8)
def programs(config: DecoderConfig, compute: Compute) -> Programs:
    """Both functions for one model on one mesh; the same ones for the same arguments."""
    return Programs(
        prefill=jax.jit(functools.partial(_prefill, config, compute), static_argnames="new_slots"),
        decode=jax.jit(functools.partial(_decode, config, compute), donate_argnums=1),
    )


def _prefill(
    config: DecoderConfig,
    compute: Compute,
    params: Params,
    tokens: jax.Array,
    rows: Rows,
    knobs: Knobs,
    *,
    new_slots: int,
) -> tuple[State, jax.Array, jax.Array]:
    B, T = tokens.shape
    model = decoder.bind(config, compute, params)
    positions = jnp.broadcast_to(jnp.arange(T), (B, T))
    valid = positions < rows.prompt_length[:, None]
    cache = kv_cache.empty(config, compute, B, T + new_slots)
    hidden, cache = model(tokens, positions, kv_cache.prefilling(config, compute, valid), cache)
    # Logits of the last token of each prompt alone: [B, T, V] would dwarf everything else.
    last = jnp.take_along_axis(hidden, rows.position[:, None, None], axis=1)
    if "repetition_penalty" in knobs:
        seen = jnp.zeros((B, config.vocab_size), bool)
        rows = dataclasses.replace(rows, seen=seen.at[jnp.arange(B)[:, None], tokens].max(valid))
    rows, token, logprob = _advance(rows, model.logits(last)[:, 0], knobs)
    state = State(cache=cache, slot=jnp.int32(T), prompt_slots=jnp.int32(T), rows=rows)
    return _settle(state, compute), *_for_host(compute, token[:, None], logprob[:, None])


def _decode(
    config: DecoderConfig, compute: Compute, params: Params, state: State, knobs: Knobs, steps: jax.Array
) -> tuple[State, jax.Array, jax.Array]:
    model = decoder.bind(config, compute, params)
    B, S = state.cache.key.shape[1:3]
    slots = jnp.arange(S)

    def unfinished(carry):
        step, state, *_ = carry
        return (step < steps) & jnp.any(state.rows.remaining > 0)

    def body(carry):
        step, state, tokens, logprobs = carry
        rows = state.rows
        in_prompt = slots < rows.prompt_length[:, None]
        visible = in_prompt | ((slots >= state.prompt_slots) & (slots <= state.slot))
        generated = rows.prompt_length[:, None] + slots - state.prompt_slots
        distance = rows.position[:, None] - jnp.where(in_prompt, slots, generated)
        attend = kv_cache.decoding(config, state.slot, visible, distance)
        hidden, cache = model(rows.token[:, None], rows.position[:, None], attend, state.cache)
        rows, token, logprob = _advance(rows, model.logits(hidden)[:, 0], knobs)
        state = dataclasses.replace(state, cache=cache, slot=state.slot + 1, rows=rows)
        tokens = jax.lax.dynamic_update_slice(tokens, token[:, None], (0, step))
        logprobs = jax.lax.dynamic_update_slice(logprobs, logprob[:, None], (0, step))
        return step + 1, _settle(state, compute), tokens, logprobs

    chosen = jnp.full((B, CHUNK), -1, jnp.int32), jnp.zeros((B, CHUNK), jnp.float32)
    _, state, tokens, logprobs = jax.lax.while_loop(unfinished, body, (jnp.int32(0), state, *chosen))
    return state, *_for_host(compute, tokens, logprobs)


def _advance(rows: Rows, logits: jax.Array, knobs: Knobs) -> tuple[Rows, jax.Array, jax.Array]:
    """Chooses from logits [B, V]; a finished row gets token -1 and stays as it is."""
    active = rows.remaining > 0
    token, logprob = choose(logits, knobs, rows.seed, rows.position + 1, rows.seen)
    stopped = jnp.any(token[:, None] == rows.stop_ids, axis=-1)
    seen = rows.seen
    if seen is not None:
        seen |= token[:, None] == jnp.arange(seen.shape[1])
    rows = dataclasses.replace(
        rows,
        token=jnp.where(active, token, rows.token),
        position=rows.position + active,
        remaining=jnp.where(active & ~stopped, rows.remaining - 1, 0),
        seen=seen,
    )
    return rows, jnp.where(active, token, -1), jnp.where(active, logprob, 0.0)


def _settle(state: State, compute: Compute) -> State:
    """Pins every array to its place, so that a donated state comes back where it was."""

    def place(array: jax.Array) -> jax.Array:
        return constrain(array, compute.mesh, *("batch", "width")[: array.ndim])

    cache = jax.tree.map(lambda array: constrain(array, compute.mesh, *kv_cache.AXES), state.cache)
    return dataclasses.replace(state, cache=cache, rows=jax.tree.map(place, state.rows))


def _for_host(compute: Compute, *arrays: jax.Array) -> tuple[Any, ...]:
    """A whole copy on every device, so that every host can read it."""
    return tuple(constrain(array, compute.mesh, "width", "width") for array in arrays)
