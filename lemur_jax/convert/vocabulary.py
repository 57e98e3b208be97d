"""Rows of the vocabulary: dropped from the end, added as the mean of the others (V vocabulary, D model)."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lemur_jax.common.errors import UserError
from lemur_jax.models.config import DecoderConfig
from lemur_jax.text.tokenizer import Tokenizer
from lemur_jax.text.tokenizer_files import revise

Array = jax.Array | np.ndarray


def resize(
    params: Mapping[str, Any], vocab_size: int, *, drop_rows_above: int = 0, new_rows: str = "refuse"
) -> dict[str, Any]:
    """The parameter tree, of NumPy or JAX arrays, with `vocab_size` rows V; UserError if the allowed changes do not
    lead there.

    Rows with ids from `drop_rows_above` on are dropped first, if it is above 0. With `new_rows` "mean", missing rows
    become the mean of the others, so that a new token starts as likely as an average one (Hewitt 2021, "Initializing
    New Word Embeddings for Pretrained Language Models").
    """
    stored = params["embed"]["embedding"].shape[0]
    rows = drop_rows_above or stored
    if not 0 < rows <= stored:
        raise UserError(f"cannot keep the first {rows} vocabulary rows of a model that has {stored}")
    if rows > vocab_size:
        raise UserError(
            f"the checkpoint has {rows} vocabulary rows but the model wants {vocab_size}: choose which to drop"
            f" with config.init.drop_rows_above={vocab_size}, or set model.vocab_size={rows}"
        )
    if rows < vocab_size and new_rows == "refuse":
        raise UserError(
            f"the checkpoint has {rows} vocabulary rows but the model wants {vocab_size}: set"
            " config.init.new_rows='mean' to add them as the mean of the old ones"
        )
    changed = dict(params)
    changed["embed"] = {"embedding": _resize_table(params["embed"]["embedding"], 0, rows, vocab_size)}
    if "head" in params:
        changed["head"] = {"kernel": _resize_table(params["head"]["kernel"], 1, rows, vocab_size)}
    return changed


def _resize_table(table: Array, axis: int, keep: int, size: int) -> Array:
    """The first `keep` entries along `axis`, and their mean up to `size`; not copied if nothing changes."""
    if keep < table.shape[axis]:
        table = table[:keep] if axis == 0 else table[:, :keep]
    if size == keep:
        return table
    xp = np if isinstance(table, np.ndarray) else jnp
    mean = xp.mean(table, axis=axis, keepdims=True, dtype=np.float32).astype(table.dtype)
    shape = list(table.shape)
    shape[axis] = size - keep
    return xp.concatenate([table, xp.broadcast_to(mean, shape)], axis=axis)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Change:
    """Changes of the vocabulary between the two formats, in this order; none by default."""

    drop_rows_above: int = 0  # > 0: rows and control tokens with ids from this one on are dropped
    add_tokens: tuple[str, ...] = ()  # control tokens that get the next ids, and rows if there are none
    vocab_size: int = 0  # > 0: rows V afterwards; missing rows become the mean of the others

    def apply(
        self, config: DecoderConfig, files: Mapping[str, bytes], where: object
    ) -> tuple[DecoderConfig, dict[str, bytes]]:
        """The model at `where` and its tokenizer's files (empty: none) after the changes.

        Raises UserError: rows would be lost without being named, or tokens and rows do not fit each other.
        """
        rows = self.drop_rows_above or config.vocab_size
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
                f"--vocab-size {size}: {where} has {rows} vocabulary rows; choose which to drop with"
                f" --drop-rows-above {size}"
            )
        if size < tokens:
            raise UserError(
                f"{where}: the tokenizer has ids up to {tokens - 1}, but the model's vocab_size is {size}:"
                f" let `lemur import-hf` or `export-hf` add rows with --vocab-size {tokens}, or drop added tokens with"
                " --drop-rows-above"
            )
        return dataclasses.replace(config, vocab_size=size), dict(files)

    def resize(self, table: np.ndarray, size: int) -> np.ndarray:
        """The embedding or the head [V, D] with `size` rows; not copied if nothing changes."""
        return np.asarray(_resize_table(table, 0, self.drop_rows_above or table.shape[0], size))


NO_CHANGE = Change()
