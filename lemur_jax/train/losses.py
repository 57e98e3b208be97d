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

    A chunk is the largest divisor of T up to `compute.loss_chunk`: logits [B, T, V] are never there at once.

    Args:
      model: for its head and for `compute.loss_chunk`.
      hidden: [B, T, D] after the final norm.
      targets: int32 [B, T], already shifted inside each document.
      weights: float32 [B, T]; 0 where nothing is to be predicted.
    """

    def chunk(hidden, targets, weights) -> RowSums:
        logits = model.logits(hidden)
        log_z = jax.nn.logsumexp(logits, axis=-1)
        # A sum over a comparison keeps a vocabulary that is cut over `tensor` where it is; a gather would not.
        hit = targets[..., None] == jnp.arange(logits.shape[-1])
        chosen = jnp.sum(jnp.where(hit, logits, 0.0), axis=-1)
        return RowSums(
            loss=jnp.sum((log_z - chosen) * weights, axis=-1),
            z=jnp.sum(jnp.square(log_z) * weights, axis=-1),
            weight=jnp.sum(weights, axis=-1),
        )

    size, split, _ = _chunks(model, *targets.shape)
    if size == targets.shape[1]:
        return chunk(hidden, targets, weights)

    def add(total: RowSums, part) -> tuple[RowSums, None]:
        return jax.tree.map(jnp.add, total, chunk(*part)), None

    zeros = RowSums(*(jnp.zeros(targets.shape[:1], jnp.float32) for _ in RowSums._fields))
    # The logits of a chunk are computed again in the backward pass rather than kept.
    body = jax.checkpoint(add, prevent_cse=False)
    total, _ = jax.lax.scan(body, zeros, (split(hidden), split(targets), split(weights)))
    return total


def target_logprobs(
    model: Decoder, hidden: jax.Array, targets: jax.Array, temperature: float = 1.0
) -> jax.Array:
    """Log-probabilities of targets, float32 [B, T], from the logits divided by `temperature`, in the same chunks."""

    def chunk(hidden, targets):
        logits = model.logits(hidden) / temperature
        hit = targets[..., None] == jnp.arange(logits.shape[-1])
        return jnp.sum(jnp.where(hit, logits, 0.0), axis=-1) - jax.nn.logsumexp(logits, axis=-1)

    return by_chunk(model, chunk, hidden, targets)


def by_chunk(model: Decoder, function: Callable, *arrays: jax.Array) -> Any:
    """What a function of positions makes of arrays [B, T, ...], in chunks as `row_sums`: arrays [B, T, ...]."""
    size, split, merge = _chunks(model, *arrays[0].shape[:2])
    if size == arrays[0].shape[1]:
        return function(*arrays)
    body = jax.checkpoint(lambda _, part: (None, function(*part)), prevent_cse=False)
    return jax.tree.map(merge, jax.lax.scan(body, None, tuple(map(split, arrays)))[1])


def _chunks(model: Decoder, B: int, T: int) -> tuple[int, Callable, Callable]:
    """Positions of a chunk, and functions that split [B, T, ...] into chunks [C, B, size, ...] and join these."""
    ways = model.compute.mesh.shape["sequence"] if model.compute.mesh else 1
    sizes = range(min(model.compute.loss_chunk or T, T), 0, -1)
    size = next((size for size in sizes if T % size == 0 and size % ways == 0), T)

    def split(x):  # [B, T, ...] -> [T / size, B, size, ...]
        # Every chunk takes as much of each device's slice of positions, so that all have work in each.
        x = jnp.moveaxis(x.reshape(B, ways, T // size, size // ways, *x.shape[2:]), 2, 0)
        return x.reshape(T // size, B, size, *x.shape[4:])

    def merge(x):
        more = x.shape[3:]
        return jnp.moveaxis(x.reshape(T // size, B, ways, size // ways, *more), 0, 2).reshape(B, T, *more)

    return size, split, merge
