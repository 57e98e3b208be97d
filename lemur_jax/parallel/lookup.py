"""Rows of a table by token, and the gradient of the table.

Axes: B batch, T position, D model, V vocabulary.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from lemur_jax.parallel.rules import spec


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 3))
def look_up(table: jax.Array, size: int, tokens: jax.Array, mesh: Mesh | None) -> jax.Array:
    """Rows of a table of `size` V, [V, D], for int32 tokens [B, T]: [B, T, D].

    In the gradient of a 16-bit table, rows of equal tokens are summed in float32 first: a bfloat16 sum stops growing
    at 256 times what is added, and a batch has a frequent token more often than that.
    """
    return jnp.take(table, tokens, axis=0, mode="clip")


def _look_up_backward(size: int, mesh: Mesh | None, tokens: jax.Array, upstream: jax.Array) -> tuple:
    D = upstream.shape[-1]

    def sum_equal(tokens, upstream):  # on each device: each token once; the rest of `ids` has no row
        ids, inverse = jnp.unique(tokens, size=tokens.size, fill_value=size, return_inverse=True)
        rows = upstream.reshape(-1, D).astype(jnp.float32)
        sums = jax.ops.segment_sum(rows, inverse.reshape(-1), tokens.size)
        return ids.reshape(tokens.shape), sums.astype(upstream.dtype).reshape(upstream.shape)

    if upstream.dtype != jnp.float32:
        if mesh is not None:
            rows = spec(mesh, ("batch", "residual_length", "width"), upstream.shape)
            specs = (PartitionSpec(*rows[:2]), rows)
            sum_equal = jax.shard_map(sum_equal, mesh=mesh, in_specs=specs, out_specs=specs, check_vma=False)
        tokens, upstream = sum_equal(tokens, upstream)
    return jnp.zeros((size, D), upstream.dtype).at[tokens].add(upstream, mode="drop"), None


look_up.defvjp(
    lambda table, size, tokens, mesh: (look_up(table, size, tokens, mesh), tokens), _look_up_backward
)
