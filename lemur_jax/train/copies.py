"""Gradients of each copy of the parameters, summed over the copies once an update.

The mesh axis `data` has the copies; those of several TPU slices are joined by a slow network. Autodiff sums gradients
over all devices in every microbatch. Instead microbatches are differentiated by copy (a `vmap` whose mapped axis is
sharded over the copies): within a copy gradients are reduced to the shards of `fsdp`, and after the last microbatch
the shards are summed over the copies.

Axis legend: C copy, B batch row of a microbatch.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lemur_jax.parallel.mesh import COPY
from lemur_jax.parallel.rules import RULES


@dataclasses.dataclass(frozen=True, kw_only=True)
class Copies:
    """How gradients are kept apart and then summed."""

    mesh: Mesh  # from `mesh_of_copies`; what is differentiated must shard by it
    shardings: Any  # of the parameters
    dtype: str  # in which shards travel between copies

    def differentiate(self, gradient_of: Callable) -> Callable:
        """`gradient_of`, (params, batch) -> (gradient, sums), with a leading axis C in the gradient.

        Its sums of each row come back as [B]; its scalar sums over the batch as [C].
        """

        def split(x):
            x = x.reshape(self.mesh.shape[COPY], -1, *x.shape[1:])
            return self._place(x, RULES["batch"], *([RULES["length"]] if x.ndim == 3 else []))

        mapped = jax.vmap(gradient_of, in_axes=(None, 0), spmd_axis_name=COPY)

        def by_copy(params, batch):
            gradient, sums = mapped(params, jax.tree.map(split, batch))
            return self._shard_by_copy(gradient), jax.tree.map(lambda x: x.reshape(-1), sums)

        return by_copy

    def zeros(self, params: Any) -> Any:
        """float32 zeros of the parameters' shapes with a leading axis C."""
        copies = self.mesh.shape[COPY]
        return self._shard_by_copy(jax.tree.map(lambda p: jnp.zeros((copies, *p.shape), jnp.float32), params))

    def sum(self, gradient: Any) -> Any:
        """The sum over the leading axis C."""

        def total(g, sharding):
            zero = jnp.zeros((), self.dtype)
            summed = jax.lax.reduce(g.astype(self.dtype), zero, jax.lax.add, (0,)).astype(g.dtype)
            return jax.lax.with_sharding_constraint(summed, sharding)

        return jax.tree.map(total, gradient, self.shardings)

    def _shard_by_copy(self, gradient: Any) -> Any:
        return jax.tree.map(lambda g, sharding: self._place(g, *sharding.spec), gradient, self.shardings)

    def _place(self, x: jax.Array, *entries: Any) -> jax.Array:
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, PartitionSpec(COPY, *entries)))
