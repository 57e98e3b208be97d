"""Keys and values of what was read so far, laid out and sharded like the model.

Axes: L layers, B batch, S cache slot, T query position, K key heads, H query heads, N head width.

A slot is a place in the cache, not a position in the text: keys are stored rotated, so their order does not matter.
Prompts are left-aligned in the first slots; generated tokens go to one slot for the whole batch, after the longest
prompt. So a step writes one contiguous slice in place, and a mask hides the gap behind each shorter prompt.
"""

import dataclasses

import jax
import jax.numpy as jnp

from lemur_jax.models.attention import grouped_attention
from lemur_jax.models.config import DecoderConfig
from lemur_jax.models.decoder import Attend, Compute, score_options, self_attention
from lemur_jax.parallel.rules import constrain

AXES = ("layers", "batch", "keys", "kv_heads", "head_dim")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class KVCache:
    """Rotated keys and values, each [L, B, S, K, N] in the compute dtype."""

    key: jax.Array
    value: jax.Array


def empty(config: DecoderConfig, compute: Compute, rows: int, slots: int) -> KVCache:
    """A cache of zeros for `rows` sequences, batch over data × fsdp and heads over tensor.

    Raises:
      UserError: the mesh divides the rows or the key heads unevenly.
    """
    shape = (config.num_hidden_layers, rows, slots, config.num_key_value_heads, config.head_dim)
    zeros = jnp.zeros(shape, compute.dtype)
    return KVCache(key=constrain(zeros, compute.mesh, *AXES), value=constrain(zeros, compute.mesh, *AXES))


def write(
    cache: KVCache, layer: jax.Array, slot: jax.Array | int, key: jax.Array, value: jax.Array
) -> KVCache:
    """The cache with key and value [B, T, K, N] of one layer in the T slots from `slot` on."""
    start = (layer, 0, slot, 0, 0)
    return KVCache(
        key=jax.lax.dynamic_update_slice(cache.key, key[None].astype(cache.key.dtype), start),
        value=jax.lax.dynamic_update_slice(cache.value, value[None].astype(cache.value.dtype), start),
    )


def prefilling(config: DecoderConfig, compute: Compute, valid: jax.Array) -> Attend:
    """Causal attention over whole prompts, whose keys go to the first T slots.

    Args:
      compute: names the attention implementation, the one that training uses.
      valid: bool [B, T], False where a shorter prompt is padded on the right; what is computed and
        written there is never looked at.
    """
    implementation = self_attention(config, compute)
    segment_ids = valid.astype(jnp.int32)

    def attend(query, key, value, cache, layer):
        mixed = implementation(query, key, value, segment_ids, layer)
        return mixed, write(cache, layer, 0, key, value)

    return attend


def decoding(config: DecoderConfig, slot: jax.Array, visible: jax.Array, distance: jax.Array) -> Attend:
    """Attention of one new position to the cache, where its own key goes to `slot`.

    Args:
      slot: int32 [].
      visible: bool [B, S], the slots that the new position sees without a window, its own included.
      distance: int32 [B, S], positions from the token in a slot to the new one.
    """
    near = distance < config.sliding_window

    def attend(query, key, value, cache, layer):
        cache = write(cache, layer, slot, key, value)
        keys, values = (
            jax.lax.dynamic_index_in_dim(a, layer, keepdims=False) for a in (cache.key, cache.value)
        )
        seen = visible & (config.attends_fully(layer) | near)
        return grouped_attention(
            query, keys, values, seen[:, None, None, None, :], score_options(config)
        ), cache

    return attend
