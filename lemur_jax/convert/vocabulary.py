"""Rows of the vocabulary: dropped from the end, added as the mean of the others.

Axis legend: V vocabulary, D model.

The recipe's way: Llama-2 has 32,000 rows; the base Lemur adds StarCoder's tokens up to 32,024; for
chat those are dropped again (their ids now mean ChatML's tokens) and the rows grow to 32,005.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lemur_jax.common.errors import UserError
from lemur_jax.models.config import LlamaConfig
from lemur_jax.text.tokenizer import Tokenizer
from lemur_jax.text.tokenizer_files import revise

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

    return _with_tables(params, lambda table, axis: _extended(table, axis, vocab_size))


def _extended(table: Array, axis: int, size: int) -> Array:
    """The table with entries along `axis` up to `size`, each the mean of those that are there."""
    xp = np if isinstance(table, np.ndarray) else jnp
    mean = xp.mean(table, axis=axis, keepdims=True, dtype=np.float32).astype(table.dtype)
    shape = list(table.shape)
    shape[axis] = size - table.shape[axis]
    return xp.concatenate([table, xp.broadcast_to(mean, shape)], axis=axis)


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Change:
    """What to do to the vocabulary on the way from one format to the other; by default nothing.

    Attributes:
      drop_rows_above: > 0: rows and control tokens with ids from this one on are forgotten first.
      add_tokens: control tokens that get the next ids, and rows where there are none.
      vocab_size: > 0: rows V afterwards; missing ones become the mean of the others.
    """

    drop_rows_above: int = 0
    add_tokens: tuple[str, ...] = ()
    vocab_size: int = 0

    def apply(
        self, config: LlamaConfig, files: Mapping[str, bytes], where: object
    ) -> tuple[LlamaConfig, dict[str, bytes]]:
        """The model and the tokenizer's files afterwards.

        Args:
          config: the model before.
          files: of its tokenizer; none where there is no tokenizer.
          where: what has that vocabulary, for messages.

        Raises:
          UserError: rows would be lost that were not named, or tokens and rows do not fit each other.
        """
        rows = self.kept(config.vocab_size)
        if not 0 < rows <= config.vocab_size:
            raise UserError(
                f"--drop-rows-above {self.drop_rows_above}: {where} has {config.vocab_size} vocabulary rows"
            )
        if self.add_tokens and not files:
            raise UserError(f"--add-tokens: {where} has no tokenizer to add them to")
        if files and (self.drop_rows_above or self.add_tokens):
            files = revise(Tokenizer(files, str(where)), keep=self.drop_rows_above, add=self.add_tokens)
        tokens = Tokenizer(files, str(where)).vocab_size if files else 0
        size = self.vocab_size or (max(rows, tokens) if self.add_tokens else rows)
        if size < rows:
            raise UserError(
                f"--vocab-size {size}: {where} has {rows} vocabulary rows; say which to forget with"
                f" --drop-rows-above {size}"
            )
        if size < tokens:
            raise UserError(
                f"{where}: the tokenizer has ids up to {tokens - 1}, but the model's vocab_size is {size}:"
                f" say --vocab-size {tokens}, or --drop-rows-above to forget added tokens"
            )
        return dataclasses.replace(config, vocab_size=size), dict(files)

    def kept(self, rows: int) -> int:
        """How many of so many rows stay."""
        return self.drop_rows_above or rows

    def of_table(self, table: np.ndarray, size: int) -> np.ndarray:
        """The embedding or the head [V, D] with `size` rows; not copied where nothing changes."""
        table = table[: self.kept(table.shape[0])]
        return table if table.shape[0] == size else np.asarray(_extended(table, 0, size))


AS_IT_IS = Change()
