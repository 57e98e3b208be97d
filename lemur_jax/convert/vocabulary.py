"""Rows of the vocabulary: dropped from the end, added as the mean of the others.

Axis legend: V vocabulary, D model.

The recipe's way: Llama-2 has 32,000 rows; the base Lemur adds StarCoder's tokens up to 32,024; for
chat those are dropped again (their ids now mean ChatML's tokens) and the rows grow to 32,005.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lemur_jax.common.errors import UserError

Array = jax.Array | np.ndarray


def drop_rows(params: Mapping[str, Any], keep: int) -> dict[str, Any]:
    """Forgets the vocabulary rows with ids from `keep` on; those that are left keep their values.

    Args:
      params: the parameter tree, of NumPy or JAX arrays; not changed.
      keep: rows that stay.

    Raises:
      UserError: there are fewer rows than that.
    """
    rows = params["embed"]["embedding"].shape[0]
    if not 0 < keep <= rows:
        raise UserError(f"cannot keep the first {keep} vocabulary rows of a model that has {rows}")
    return _with_tables(params, lambda table, axis: table[:keep] if axis == 0 else table[:, :keep])


def extend_rows(params: Mapping[str, Any], vocab_size: int) -> dict[str, Any]:
    """Adds vocabulary rows up to `vocab_size`, each the mean of the rows that are there.

    So a new token starts about as likely as an average one, and the others lose little by it (Hewitt
    2021, "Initializing New Word Embeddings for Pretrained Language Models").

    Args:
      params: the parameter tree, of NumPy or JAX arrays; not changed.
      vocab_size: rows V afterwards.

    Raises:
      UserError: there are more rows than that already.
    """
    rows = params["embed"]["embedding"].shape[0]
    if vocab_size < rows:
        raise UserError(f"cannot extend a vocabulary of {rows} rows to {vocab_size}: drop rows first")

    def extend(table: Array, axis: int) -> Array:
        xp = np if isinstance(table, np.ndarray) else jnp
        mean = xp.mean(table, axis=axis, keepdims=True, dtype=np.float32).astype(table.dtype)
        shape = list(table.shape)
        shape[axis] = vocab_size - rows
        return xp.concatenate([table, xp.broadcast_to(mean, shape)], axis=axis)

    return _with_tables(params, extend)


def resize(
    params: Mapping[str, Any], vocab_size: int, *, drop_rows_above: int = 0, new_rows: str = "refuse"
) -> dict[str, Any]:
    """Brings the vocabulary to `vocab_size` rows, in the words of `config.init`.

    Args:
      params: the parameter tree, of NumPy or JAX arrays; not changed.
      vocab_size: rows V afterwards.
      drop_rows_above: > 0: rows with ids from this one on are forgotten first.
      new_rows: "mean": missing rows become the mean of the others; "refuse": they are an error.

    Raises:
      UserError: the rows do not come to `vocab_size` by what is allowed.
    """
    if new_rows not in ("mean", "refuse"):
        raise UserError(f"config.init.new_rows is {new_rows!r}: it must be 'mean' or 'refuse'")
    if drop_rows_above:
        params = drop_rows(params, drop_rows_above)
    rows = params["embed"]["embedding"].shape[0]
    if rows > vocab_size:
        raise UserError(
            f"the checkpoint has {rows} vocabulary rows but the model wants {vocab_size}: say which to"
            f" forget with config.init.drop_rows_above={vocab_size}, or set model.vocab_size={rows}"
        )
    if rows < vocab_size and new_rows == "refuse":
        raise UserError(
            f"the checkpoint has {rows} vocabulary rows but the model wants {vocab_size}: say"
            " config.init.new_rows='mean' to add them as the mean of the old ones"
        )
    return extend_rows(params, vocab_size) if rows < vocab_size else dict(params)


def _with_tables(params: Mapping[str, Any], change: Callable[[Array, int], Array]) -> dict[str, Any]:
    """The tree with `change(table, vocabulary axis)` applied to the embedding [V, D] and the head [D, V]."""
    changed = dict(params)
    changed["embed"] = {**params["embed"], "embedding": change(params["embed"]["embedding"], 0)}
    if "head" in params:
        changed["head"] = {**params["head"], "kernel": change(params["head"]["kernel"], 1)}
    return changed
