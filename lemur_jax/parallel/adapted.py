"""A weight with a low-rank update beside it (LoRA, Hu et al. 2021), in the place of a plain array.

Axis legend: R rank, I axes that a product with the weight sums over, O axes of its result.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Adapted:
    """A weight W + scale · a b, whose product with x is x W + scale · dropout(x) a b.

    Attributes:
      base: W [I, O], an array or a `qwix.QArray`; it has no gradient.
      a, b: [I, R] and [R, O], of any float dtype. Stacked layers have a leading axis L, as in `base`.
      keys: uint32 key data [B, 2] of the dropout of each row of a batch; None: no dropout.
      scale: factor of the update.
      dropout: probability that an input of `a` is dropped.
    """

    base: Any
    a: jax.Array
    b: jax.Array
    keys: jax.Array | None = None
    scale: float = dataclasses.field(metadata=dict(static=True))
    dropout: float = dataclasses.field(default=0.0, metadata=dict(static=True))

    def drop(self, x: jax.Array) -> jax.Array:
        """`x` [B, ...] with dropout, if there are keys."""
        if self.keys is None:
            return x
        keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - self.dropout, x.shape[1:]))
        kept = keep(jax.random.wrap_key_data(self.keys))
        return jnp.where(kept, x / (1 - self.dropout), 0).astype(x.dtype)


def is_adapted(params: Any) -> bool:
    """Whether a tree of parameters holds an `Adapted`."""
    leaves = jax.tree.leaves(params, is_leaf=lambda leaf: isinstance(leaf, Adapted))
    return any(isinstance(leaf, Adapted) for leaf in leaves)


def num_inputs(axes: tuple[str, ...]) -> int:
    """How many of the leading logical axes of one layer's weight a product sums over: `embed`, or all before it."""
    return 1 if axes[0] == "embed" else len(axes) - 1
