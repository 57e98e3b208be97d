"""Rows: views of a token store as examples of fixed length, any of them at any time.

`ConcatRows` (pretraining) cuts the stream of all documents every T tokens; `FitRows` (chat) packs whole documents.
Targets are shifted inside each document, and the loss mask is the store's: no token value has a meaning here.

Axes: R rows of one read, T position in a row.
"""

import logging
from typing import Protocol

import numpy as np

from lemur_jax.common.errors import UserError
from lemur_jax.data.manifest import REJECTED
from lemur_jax.data.packing import open_packing
from lemur_jax.data.store import TokenStore

logger = logging.getLogger(__name__)

# One read: "tokens", "targets", "segment_ids", "positions" int32 [R, T], "loss_weights" float32 [R, T].
Batch = dict[str, np.ndarray]


class Rows(Protocol):
    """What the mixture and the loader need of a view."""

    store: TokenStore  # what it is a view of
    length: int  # T
    num_tokens: int  # real (not padding) positions of all rows together
    truncated: int = 0  # documents that are cut at T

    def __len__(self) -> int: ...

    def read(self, indices: np.ndarray) -> Batch:
        """Rows by index, int64 [R].

        Returns:
          tokens, targets: int32 [R, T]; a target is the token that follows in the same document.
          loss_weights: float32 [R, T]; 0 where there is no target, or one that is not supervised.
          segment_ids: int32 [R, T]; 1, 2, ... for the documents of a row, 0 for padding.
          positions: int32 [R, T]; from 0 in each segment of the row.
        """
        ...

    def documents(self, index: int) -> list[str]:
        """Ids of the documents in a row."""
        ...

    @property
    def tokens_per_row(self) -> float:
        """Mean number of real positions."""
        return self.num_tokens / len(self)


class ConcatRows(Rows):
    """The token stream cut every T: row i has inputs [i T, (i+1) T) and targets one further.

    A document that is cut continues in the next row, as a segment of its own with positions from 0. The target of a
    document's last token, which would be the next document's first, weighs 0. The last row is padded.
    """

    def __init__(self, store: TokenStore, length: int):
        self.store = store
        self.length = length
        self.num_tokens = store.num_tokens - 1  # the last one has no target
        if self.num_tokens < 1:
            raise UserError(f"the token store {store.path} has a single token, so nothing to predict")

    def __len__(self) -> int:
        return -(-self.num_tokens // self.length)

    def read(self, indices: np.ndarray) -> Batch:
        starts = np.asarray(indices, np.int64) * self.length
        lengths = np.minimum(self.length + 1, self.store.num_tokens - starts)
        real = np.arange(self.length + 1) < lengths[:, None]
        tokens = _scatter(self.store.tokens(starts, lengths), real)

        spans, _, positions = self.store.document_starts(starts, starts + lengths)
        begins = np.zeros(real.shape, bool)
        inside = positions >= starts[spans]
        begins[spans[inside], (positions - starts[spans])[inside]] = True
        has_target = real[:, 1:] & ~begins[:, 1:]
        weights = has_target
        if self.store.manifest.has_loss_mask:
            weights = has_target & (_scatter(self.store.loss_mask(starts, lengths), real)[:, 1:] != 0)
        begins[:, 0] = True
        return _batch(tokens[:, :-1], tokens[:, 1:] * has_target, weights, begins[:, :-1], real[:, 1:])

    def documents(self, index: int) -> list[str]:
        start = index * self.length
        stop = min(start + self.length, self.num_tokens)
        _, documents, _ = self.store.document_starts(np.array([start]), np.array([stop]))
        return self.store.document_ids(documents)


class FitRows(Rows):
    """Whole documents packed into rows of T by best-fit decreasing; longer ones are cut at T.

    Inside a row documents are in the store's order. The same store and T give the same rows. In a store of
    preferences, document n = 1, 2, ... of a row is the segments 2 n (chosen) and 2 n + 1 (rejected).

    Attributes:
      without_targets: documents without a supervised token in their first T; of pairs, where one answer has none.

    Raises:
      UserError: no document has a supervised token within T; for preferences `train.inputs` refuses this.
    """

    def __init__(self, store: TokenStore, length: int):
        self.store = store
        self.length = length
        self._packing = open_packing(store, length)
        counts = self._packing.counts
        self.num_tokens = counts.tokens
        self.truncated, self.without_targets = counts.truncated, counts.without_targets
        if self.without_targets:
            _report_without_targets(store, length, self.without_targets)

    def __len__(self) -> int:
        return self._packing.counts.rows

    def read(self, indices: np.ndarray) -> Batch:
        counts, starts, lengths = self._packing.spans(np.asarray(indices, np.int64))
        ends = np.cumsum(lengths)
        row_ends = ends[np.cumsum(counts) - 1]
        row_lengths = np.diff(row_ends, prepend=0)
        real = np.arange(self.length) < row_lengths[:, None]
        flat = self.store.tokens(starts, lengths)
        begins = np.zeros(len(flat), bool)
        begins[ends - lengths] = True
        mask = self.store.loss_mask(starts, lengths) if self.store.manifest.has_loss_mask else None
        rejected = np.zeros_like(begins) if mask is None else mask == REJECTED
        segment_begins = begins | rejected
        # The next of the joined tokens is the target, unless it begins a document.
        has_target = ~np.append(segment_begins[1:], True)
        weights = has_target if mask is None else has_target & (np.append(mask[1:], 0) == 1)
        targets = np.append(flat[1:], 0) * has_target
        tokens, targets, weights, begins, rejected, segment_begins = (
            _scatter(values, real) for values in (flat, targets, weights, begins, rejected, segment_begins)
        )
        batch = _batch(tokens, targets, weights, segment_begins, real)
        if self.store.manifest.preferences:
            batch["segment_ids"] = _sides(begins, rejected) * real
        return batch

    def documents(self, index: int) -> list[str]:
        return self.store.document_ids(self._packing.documents(index))


def _sides(begins: np.ndarray, rejected: np.ndarray) -> np.ndarray:
    """Segment ids of documents that begin where `begins` is true, and their rejected parts where `rejected` is."""
    index = np.arange(begins.shape[1], dtype=np.int32)
    document, part = (np.maximum.accumulate(np.where(mask, index, -1), axis=1) for mask in (begins, rejected))
    return 2 * np.cumsum(begins, axis=1, dtype=np.int32) + (part >= document)


def _report_without_targets(store: TokenStore, length: int, count: int) -> None:
    problem, consequence = "no supervised token", "nothing is trained on them"
    if store.manifest.preferences:
        problem, consequence = "an answer without a token", "only kto trains on their other answer"
    message = (
        f"the token store {store.path}: {count:,} of {store.num_documents:,} documents have {problem} in their first"
        f" {length:,}, so {consequence}: raise data.sequence_length or shorten the prompts"
    )
    if count == store.num_documents and not store.manifest.preferences:
        raise UserError(message)
    logger.warning(message)


def _batch(
    tokens: np.ndarray, targets: np.ndarray, weights: np.ndarray, begins: np.ndarray, real: np.ndarray
) -> Batch:
    """A batch whose segments begin where `begins` [R, T] is true; padding is 0 everywhere."""
    index = np.arange(tokens.shape[1], dtype=np.int32)
    segments = np.cumsum(begins, axis=1, dtype=np.int32)
    positions = index - np.maximum.accumulate(np.where(begins, index, 0), axis=1)
    return {
        "tokens": (tokens * real).astype(np.int32),
        "targets": targets.astype(np.int32),
        "loss_weights": weights.astype(np.float32),
        "segment_ids": segments * real,
        "positions": positions * real,
    }


def _scatter(values: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Puts values [n] at the n true positions of `mask`, in order; 0 elsewhere."""
    if mask.all():
        return values.reshape(mask.shape)
    result = np.zeros(mask.shape, values.dtype)
    result[mask] = values
    return result
