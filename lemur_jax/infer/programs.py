"""Prefill, admit and decode: the functions that run on the devices.

Axis legend: B row, P prompt in prefill, C prompt position of a chunk, S cache slot, V vocabulary, J stop ids,
N tokens a dispatch.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from lemur_jax.infer.sampling import Knobs, Sampling, choose
from lemur_jax.models import decoder, kv_cache
from lemur_jax.models.config import DecoderConfig
from lemur_jax.models.decoder import Compute, Params
from lemur_jax.models.kv_cache import KVCache
from lemur_jax.parallel.rules import RULES, batch_shards, constrain

# The most tokens of one dispatch of decode.
CHUNK = 64


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeRows:
    """The sequences in decode.

    Attributes:
      tokens: int32 [B, S], the token at each position.
      position: int32 [B], of the last token; its key is not in the cache yet.
      remaining: int32 [B], tokens that may still be chosen; 0: the row is free.
      seed: uint32 [B].
      long: bool [B], as in `rope.rotary_angles`.
      stop_ids: int32 [B, J], padded with -1.
      knobs: [B] each.
    """

    tokens: Any
    position: Any
    remaining: Any
    seed: Any
    long: Any
    stop_ids: Any
    knobs: Knobs


def empty_rows(B: int, S: int, J: int) -> DecodeRows:
    """Free rows, as NumPy arrays."""
    knobs = {name: np.full(B, value) for name, value in Sampling().knobs().items()}
    zeros = np.zeros(B, np.int32)
    return DecodeRows(
        tokens=np.zeros((B, S), np.int32),
        position=zeros,
        remaining=zeros.copy(),
        seed=np.zeros(B, np.uint32),
        long=np.zeros(B, bool),
        stop_ids=np.full((B, J), -1, np.int32),
        knobs=knobs,
    )


class Programs:
    """The compiled functions of a model on a mesh; each donates the cache or state that it replaces.

    Attributes:
      empty: (rows, slots), both static -> KVCache.
      prefill: (params, cache, tokens int32 [P, C], start int32 [P], long bool [P]) -> cache, with the keys of the
        tokens in the slots of its first P rows from `start` on.
      recall: (prompts: cache of P rows, cache, row int32 [P]) -> prompts, in which prompt p has the cache of row
        `row[p]`, if that is not -1; both on the same devices.
      admit: (cache, rows, prompts: cache of P rows, source int32 [B], new rows) -> (cache, rows), in which row b is
        the new one with the cache of prompt `source[b]`, if that is not -1.
      decode: (params, cache, rows, keep bool [B], steps, busy) -> (cache, rows, tokens int32 [B, N], logprobs
        float32 [B, N]). Chooses `steps` ≤ N tokens, -1 where a row is free; ends when no more than `busy` rows are
        left. Rows that are not kept are free from the start.
    """

    def __init__(self, config: DecoderConfig, compute: Compute):
        self._config, self._compute = config, compute
        self.empty = jax.jit(functools.partial(kv_cache.empty, config, compute), static_argnums=(0, 1))
        self.prefill = jax.jit(self._prefill, donate_argnums=1)
        self.recall = jax.jit(self._recall, donate_argnums=0)
        self.admit = jax.jit(self._admit, donate_argnums=(0, 1))
        self.decode = jax.jit(self._decode, donate_argnums=(1, 2))

    def _prefill(
        self, params: Params, cache: KVCache, tokens: jax.Array, start: jax.Array, long: jax.Array
    ) -> KVCache:
        positions = start[:, None] + jnp.arange(tokens.shape[1])
        model = decoder.bind(self._config, self._compute, params)
        rows = jax.tree.map(lambda array: array[:, : len(tokens)], cache)
        _, rows, _ = model(tokens, positions, self._cached(positions, jnp.max(positions)), rows, long)
        cache = jax.tree.map(lambda array, new: array.at[:, : len(tokens)].set(new), cache, rows)
        return self._settle(cache)

    def _recall(self, prompts: KVCache, cache: KVCache, row: jax.Array) -> KVCache:
        rows, shards = cache.key.shape[1], batch_shards(self._compute.mesh)

        def copy(prompts, cache, row):
            local_row = jnp.maximum(row, 0) % (rows // shards)
            return jnp.where((row >= 0)[:, None, None, None], cache[:, local_row], prompts)

        # Each device copies its own rows: the partitioner would gather the cache.
        cache_spec, row_spec = kv_cache.SPEC, PartitionSpec(RULES["batch"])
        copy = jax.shard_map(
            copy, mesh=self._compute.mesh, in_specs=(cache_spec, cache_spec, row_spec), out_specs=cache_spec
        )
        return jax.tree.map(lambda prompts, cache: copy(prompts, cache, row), prompts, cache)

    def _admit(
        self, cache: KVCache, rows: DecodeRows, prompts: KVCache, source: jax.Array, new: DecodeRows
    ) -> tuple[KVCache, DecodeRows]:
        taken = source >= 0

        def copy(old, prompts):
            return jnp.where(taken[:, None, None, None], prompts[:, jnp.maximum(source, 0)], old)

        def replace(old, new):
            return jnp.where(taken.reshape(-1, *(1,) * (old.ndim - 1)), new, old)

        cache = self._settle(jax.tree.map(copy, cache, prompts))
        return cache, self._settle_rows(jax.tree.map(replace, rows, new))

    def _decode(
        self,
        params: Params,
        cache: KVCache,
        rows: DecodeRows,
        keep: jax.Array,
        steps: jax.Array,
        busy: jax.Array,
    ) -> tuple[KVCache, DecodeRows, jax.Array, jax.Array]:
        model = decoder.bind(self._config, self._compute, params)
        B = rows.tokens.shape[0]

        def unfinished(carry):
            step, _, rows, *_ = carry
            return (step < steps) & (jnp.sum(rows.remaining > 0) > busy)

        def body(carry):
            step, cache, rows, tokens, logprobs = carry
            positions = rows.position[:, None]
            token = jnp.take_along_axis(rows.tokens, positions, axis=1)
            last = jnp.max(jnp.where(rows.remaining > 0, rows.position, 0))
            hidden, cache, _ = model(token, positions, self._cached(positions, last), cache, rows.long)
            rows, token, logprob = _advance(rows, model.logits(hidden)[:, 0])
            tokens = jax.lax.dynamic_update_slice(tokens, token[:, None], (0, step))
            logprobs = jax.lax.dynamic_update_slice(logprobs, logprob[:, None], (0, step))
            return step + 1, self._settle(cache), self._settle_rows(rows), tokens, logprobs

        rows = dataclasses.replace(rows, remaining=jnp.where(keep, rows.remaining, 0))
        chosen = jnp.full((B, CHUNK), -1, jnp.int32), jnp.zeros((B, CHUNK), jnp.float32)
        _, cache, rows, tokens, logprobs = jax.lax.while_loop(
            unfinished, body, (jnp.int32(0), cache, rows, *chosen)
        )
        return cache, rows, self._replicate(tokens), self._replicate(logprobs)

    def _replicate(self, array: jax.Array) -> jax.Array:
        """A whole copy on every device, so that every host can read it."""
        return constrain(array, self._compute.mesh, "width", "width")

    def _cached(self, positions: jax.Array, last: jax.Array) -> Any:
        return kv_cache.cached(self._config, self._compute, positions, last)

    def _settle(self, cache: KVCache) -> KVCache:
        """Constrains every array to its sharding, so that the buffers of a donated one can be reused."""
        return jax.tree.map(lambda array: constrain(array, self._compute.mesh, *kv_cache.AXES), cache)

    def _settle_rows(self, rows: DecodeRows) -> DecodeRows:
        mesh = self._compute.mesh
        return jax.tree.map(lambda x: constrain(x, mesh, *("batch", "width")[: x.ndim]), rows)


# The functions for one model on one mesh; the same ones for the same arguments.
programs = functools.lru_cache(maxsize=8)(Programs)


def _advance(rows: DecodeRows, logits: jax.Array) -> tuple[DecodeRows, jax.Array, jax.Array]:
    """Chooses from logits [B, V]; a free row gets token -1 and stays as it is."""
    active = rows.remaining > 0
    slots = jnp.arange(rows.tokens.shape[1])
    history = jnp.where(slots <= rows.position[:, None], rows.tokens, -1)
    token, logprob = choose(logits, rows.knobs, rows.seed, rows.position + 1, history)
    stopped = jnp.any(token[:, None] == rows.stop_ids, axis=-1)
    position = rows.position + active
    # The last token that a full row may choose has no slot, and needs none.
    written = active[:, None] & (slots == position[:, None])
    rows = dataclasses.replace(
        rows,
        tokens=jnp.where(written, token[:, None], rows.tokens),
        position=jnp.minimum(position, rows.tokens.shape[1] - 1),
        remaining=jnp.where(active & ~stopped, rows.remaining - 1, 0),
    )
    return rows, jnp.where(active, token, -1), jnp.where(active, logprob, 0.0)
