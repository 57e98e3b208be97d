"""Keys and values of the tokens read so far, laid out and sharded like the model.

Axes: L layers, B batch, S cache slot, T query position, K key heads, H query heads, N head width.

Heads come before slots, so that a head's keys are a matrix [S, N] in memory: attention reads them as they lie.

A token's slot is its position in its sequence, whatever the other rows hold. A slot is written at the step at which it
becomes visible, so leftovers of an earlier sequence or of padding are never seen.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from lemur_jax.models.attention import grouped_attention
from lemur_jax.models.config import DecoderConfig
from lemur_jax.models.decoder import Attend, Compute, score_options
from lemur_jax.models.scores import ScoreOptions
from lemur_jax.parallel.mesh import platform
from lemur_jax.parallel.rules import RULES, constrain

AXES = ("layers", "batch", "kv_heads", "keys", "head_dim")
SPEC = PartitionSpec(*(RULES[axis] for axis in AXES))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class KVCache:
    """Rotated keys and values, each [L, B, K, S, N] in the compute dtype."""

    key: jax.Array
    value: jax.Array


def empty(config: DecoderConfig, compute: Compute, rows: int, slots: int) -> KVCache:
    """A cache of zeros for `rows` sequences, batch over data × fsdp and heads over tensor.

    Raises:
      UserError: the mesh divides the rows or the key heads unevenly.
    """
    shape = (config.num_hidden_layers, rows, config.num_key_value_heads, slots, config.head_dim)
    zeros = jnp.zeros(shape, compute.dtype)
    return KVCache(key=constrain(zeros, compute.mesh, *AXES), value=constrain(zeros, compute.mesh, *AXES))


def write(
    cache: KVCache,
    layer: jax.Array,
    start: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mesh: Mesh | None = None,
) -> KVCache:
    """The cache with key and value [B, T, K, N] of one layer in the T slots of each row from `start` int32 [B] on."""

    def put(cache, layer, start, new):
        def row(b, cache):
            piece = jax.lax.dynamic_slice_in_dim(new, b, 1)[None].astype(cache.dtype)
            return jax.lax.dynamic_update_slice(cache, piece, (layer, b, 0, start[b], 0))

        # In place, row by row: `vmap` would make a scatter, with which decode takes twice as long on CPU.
        return jax.lax.fori_loop(0, new.shape[0], row, cache)

    if mesh is not None:  # each device writes its own rows: the partitioner would gather the cache
        rows = PartitionSpec(*SPEC[1:])
        specs = (SPEC, PartitionSpec(), PartitionSpec(RULES["batch"]), rows)
        put = jax.shard_map(put, mesh=mesh, in_specs=specs, out_specs=SPEC)
    key, value = (jnp.swapaxes(new, 1, 2) for new in (key, value))
    return KVCache(key=put(cache.key, layer, start, key), value=put(cache.value, layer, start, value))


def cached(config: DecoderConfig, compute: Compute, positions: jax.Array, last: jax.Array) -> Attend:
    """Causal attention of new positions to themselves and to what each row's cache holds.

    Args:
      positions: int32 [B, T], consecutive in each row; the slots where keys and values go.
      last: int32 [], the greatest position whose result is used. On CPU, attention reads the slots up to it, rounded up
        to a power of two. On TPU it reads all: selecting a size there copies the cache, which makes decode eight times
        slower (an estimate).
    """
    on_cpu = compute.mesh is not None and platform(compute.mesh) == "cpu"

    def attend(query, key, value, cache, layer):
        cache = write(cache, layer, positions[:, 0], key, value, compute.mesh)
        sizes = _sizes(cache.key.shape[3]) if on_cpu else [cache.key.shape[3]]
        branches = [functools.partial(attend_to, slots) for slots in sizes]
        index = jnp.searchsorted(jnp.array(sizes), last, side="right")
        return jax.lax.switch(index, branches, query, cache, layer), cache

    def attend_to(slots, query, cache, layer):
        keys, values = (
            jax.lax.dynamic_index_in_dim(a[..., :slots, :], layer, keepdims=False)
            for a in (cache.key, cache.value)
        )
        distance = positions[..., None] - jnp.arange(slots)
        visible = distance >= 0
        if config.sliding_window:
            visible &= config.attends_fully(layer) | (distance < config.sliding_window)
        visible, options = visible[:, None, None], score_options(config)
        if on_cpu and query.shape[1] == 1:
            return _single_query(query, keys, values, visible, options)
        keys, values = (jnp.swapaxes(each, 1, 2) for each in (keys, values))
        return grouped_attention(query, keys, values, visible, options)

    return attend


def _sizes(slots: int) -> list[int]:
    """The numbers of slots that attention is compiled for: powers of two from 128, and all slots."""
    return [2**n for n in range(7, (slots - 1).bit_length())] + [slots]


def _single_query(
    query: jax.Array, keys: jax.Array, values: jax.Array, visible: jax.Array, options: ScoreOptions
) -> jax.Array:
    """`grouped_attention` of one query to keys and values [B, K, S, N], as sums that XLA fuses on CPU.

    A product there would first copy the layer's keys out of the cache.
    """
    B, _, H, N = query.shape
    K = keys.shape[1]
    grouped = query.reshape(B, K, H // K, 1, N) * jnp.asarray(options.scale(N), query.dtype)
    scores = jnp.sum(grouped * keys[:, :, None], axis=-1, dtype=jnp.float32)
    if options.softcap:
        scores = options.softcap * jnp.tanh(scores / options.softcap)
    scores = jnp.where(visible[:, :, :, 0], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1)[..., None].astype(values.dtype)
    mixed = jnp.sum(weights * values[:, :, None], axis=-2, dtype=jnp.float32)
    return mixed.astype(query.dtype).reshape(B, 1, H, N)
