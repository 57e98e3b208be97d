"""Next-token loss as sums, so that any split of the batch adds up to the same number.

Axis legend: B batch row, T position, D model, V vocabulary.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lemur_jax.models.decoder import Decoder


class RowSums(NamedTuple):
    """Sums over the positions of each row, float32 [B]."""

    loss: jax.Array  # weighted token losses in nats, without the z-loss
    z: jax.Array | None  # weighted squares of log Z; None: not computed
    weight: jax.Array  # loss weights


def row_sums(model: Decoder, hidden: jax.Array, targets: jax.Array, weights: jax.Array) -> RowSums:
    """Cross-entropy of the head's logits, in chunks of positions.

    A chunk is the largest divisor of T up to `compute.loss_chunk`: the logits [B, T, V] are never in memory at once.

    Args:
      model: for its head and for `compute.loss_chunk`.
      hidden: [B, T, D] after the final norm.
      targets: int32 [B, T], already shifted inside each document.
      weights: float32 [B, T]; 0 where nothing is to be predicted.
    """
    chosen, log_z = _target_logits(model, hidden, targets)
    return RowSums(
        loss=jnp.sum((log_z - chosen) * weights, axis=-1),
        z=jnp.sum(jnp.square(log_z) * weights, axis=-1),
        weight=jnp.sum(weights, axis=-1),
    )


def target_logprobs(model: Decoder, hidden: jax.Array, targets: jax.Array) -> jax.Array:
    """Log-probabilities of targets, float32 [B, T], in the same chunks."""
    chosen, log_z = _target_logits(model, hidden, targets)
    return chosen - log_z


def _target_logits(model: Decoder, hidden: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(logits of the targets, log Z), float32 [B, T]."""

    def chunk(hidden, targets):
        logits = model.logits(hidden)
        # A sum over a comparison leaves a vocabulary that is sharded over `tensor` in place; a gather would not.
        hit = targets[..., None] == jnp.arange(logits.shape[-1])
        return jnp.sum(jnp.where(hit, logits, 0.0), axis=-1), jax.nn.logsumexp(logits, axis=-1)

    return by_chunk(model, chunk, hidden, targets)


def by_chunk(model: Decoder, function: Callable, *arrays: jax.Array) -> Any:
    """Applies a function of positions to arrays [B, T, ...] in chunks, as `row_sums`; returns arrays [B, T, ...]."""
    B, T = arrays[0].shape[:2]
    shards = model.compute.mesh.shape["sequence"] if model.compute.mesh else 1
    sizes = range(min(model.compute.loss_chunk or T, T), 0, -1)
    size = next((size for size in sizes if T % size == 0 and size % shards == 0), T)
    if size == T:
        return function(*arrays)

    def split(x):  # [B, T, ...] -> [T / size, B, size, ...]
        # Every chunk takes an equal part of each device's slice of positions, so that all devices have work.
        x = jnp.moveaxis(x.reshape(B, shards, T // size, size // shards, *x.shape[2:]), 2, 0)
        return x.reshape(T // size, B, size, *x.shape[4:])

    def merge(x):
        rest = x.shape[3:]
        return jnp.moveaxis(x.reshape(T // size, B, shards, size // shards, *rest), 0, 2).reshape(B, T, *rest)

    # The logits of a chunk are computed again in the backward pass rather than kept.
    body = jax.checkpoint(lambda _, chunk: (None, function(*chunk)), prevent_cse=False)
    return jax.tree.map(merge, jax.lax.scan(body, None, tuple(map(split, arrays)))[1])
