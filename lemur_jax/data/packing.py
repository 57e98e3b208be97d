"""Whole documents packed into rows of T tokens: which document lies in which row, stored beside the tokens.

    STORE/packed-4096/documents    int64 [documents]   in the order of the rows, in a row in the store's order
    STORE/packed-4096/starts       int64 [documents]   where each of these begins in the store's tokens
    STORE/packed-4096/lengths      int32 [documents]   how many of its tokens are in the row: T at most
    STORE/packed-4096/row_offsets  int64 [rows + 1]    where each row begins in the arrays above
    STORE/packed-4096/packing.json                     counts and digests; written last

`lemur prepare`, or the first process that opens a store with this T, makes it in memory that does not grow with the
corpus. It is read at random like the store itself.
"""

import dataclasses
import tempfile
import uuid
import weakref
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from etils import epath

from lemur_jax.common.errors import UserError, reason_of
from lemur_jax.common.json_files import read_sealed, write_sealed
from lemur_jax.data.arrays import ArrayWriter, metadata_digest, open_array, read_bounds, read_spans
from lemur_jax.data.manifest import REJECTED
from lemur_jax.data.store import TokenStore

# Documents that are packed together: every P-th of the store, so that a row mixes documents of the whole store.
GROUP_DOCUMENTS = 1 << 16
_COPIED = 1 << 20
_SHARD_BYTES = 1 << 22
_DTYPES = {"documents": "int64", "starts": "int64", "lengths": "int32", "row_offsets": "int64"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class PackingCounts:
    """The content of `packing.json`, apart from its seal."""

    documents: int
    rows: int
    tokens: int  # without padding
    truncated: int  # documents longer than T
    # documents without a supervised token in their first T; of pairs: where one answer has none
    without_targets: int
    arrays: Mapping[str, str]  # sha256 (hex) of each array's `zarr.json`
    store: str = ""  # the store's digest; packings of earlier versions have none


class Packing:
    """The rows of one store and one T. ValueError: it is damaged."""

    def __init__(self, folder: epath.Path):
        self.counts = PackingCounts(**read_sealed(folder / "packing.json"))
        futures = {name: open_array(folder / name, digest=self.counts.arrays[name]) for name in _DTYPES}
        self._arrays = {name: future.result() for name, future in futures.items()}

    def spans(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of rows, int64 [R]: how many documents each has, [R], and (start, length) of these in the store's tokens."""
        offsets, counts = read_bounds(self._arrays["row_offsets"], rows)
        starts, lengths = (read_spans(self._arrays[name], offsets, counts) for name in ("starts", "lengths"))
        return counts, starts, lengths.astype(np.int64)

    def documents(self, row: int) -> np.ndarray:
        """Indices of the documents in a row."""
        bounds = read_bounds(self._arrays["row_offsets"], np.array([row]))
        return read_spans(self._arrays["documents"], *bounds)


def open_packing(store: TokenStore, length: int) -> Packing:
    """The packing of a store, made first if it is not there; UserError: it is damaged, or of another store.

    Where the store cannot be written, each process that needs it makes it in a temporary directory.
    """
    folder = store.path / f"packed-{length}"
    if not (folder / "packing.json").exists():
        partial = store.path / f".packed-{length}.{uuid.uuid4().hex}"
        try:
            partial.mkdir()
        except OSError:
            temporary = tempfile.TemporaryDirectory()
            packing = Packing(_write(store, length, epath.Path(temporary.name)))
            weakref.finalize(packing, temporary.cleanup)
            return packing
        _put_in_place(_write(store, length, partial), folder)
    try:
        packing = Packing(folder)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"{folder} is damaged ({reason_of(error)}): remove that directory, and it is made again"
        ) from error
    if packing.counts.store not in ("", store.manifest.digest):
        raise UserError(f"{folder} was made from another store: remove that directory, and it is made again")
    return packing


def _put_in_place(partial: epath.Path, folder: epath.Path) -> None:
    counts = read_sealed(partial / "packing.json")
    (partial / "packing.json").unlink()
    try:
        partial.rename(folder)
    except OSError:  # another process was faster, with the same files
        partial.rmtree()
    # After the rename, which on gs:// copies file by file.
    write_sealed(folder / "packing.json", counts)


def _write(store: TokenStore, length: int, folder: epath.Path) -> epath.Path:
    writers = {
        name: ArrayWriter(folder / name, dtype, shard_bytes=_SHARD_BYTES) for name, dtype in _DTYPES.items()
    }
    totals = dict.fromkeys(("documents", "rows", "tokens", "truncated", "without_targets"), 0)
    writers["row_offsets"].append([0])
    groups = -(-store.num_documents // GROUP_DOCUMENTS)
    with tempfile.TemporaryDirectory() as temporary:
        offsets = store.map_offsets(Path(temporary) / "offsets")
        for group in range(groups):
            documents = np.arange(group, store.num_documents, groups)
            starts = offsets[documents]
            lengths = offsets[documents + 1] - starts
            truncated = starts[lengths > length], lengths[lengths > length]
            lengths = np.minimum(lengths, length)
            order, row_offsets = pack(lengths, length)
            for name, values in (("documents", documents), ("starts", starts), ("lengths", lengths)):
                writers[name].append(values[order])
            writers["row_offsets"].append(totals["documents"] + row_offsets[1:])
            totals["documents"] += len(documents)
            totals["rows"] += len(row_offsets) - 1
            totals["tokens"] += int(lengths.sum())
            totals["truncated"] += len(truncated[0])
            if store.manifest.has_loss_mask:
                totals["without_targets"] += _count_without_targets(store, *truncated, length)
    for writer in writers.values():
        writer.close()
    arrays = {name: metadata_digest(folder / name) for name in writers}
    write_sealed(folder / "packing.json", {**totals, "arrays": arrays, "store": store.manifest.digest})
    return folder


def _count_without_targets(store: TokenStore, starts: np.ndarray, sizes: np.ndarray, length: int) -> int:
    """Number of documents without a target in their first `length` tokens; of pairs, where one conversation has none.

    `starts` and `sizes`: int64 [documents], where each begins in the store and its tokens.
    """
    count, step = 0, max(1, _COPIED // length)
    # The rejected conversation may begin anywhere.
    sizes = sizes if store.manifest.preferences else np.minimum(sizes, length)
    for start in range(0, len(starts), step):
        batch = sizes[start : start + step]
        mask = store.loss_mask(starts[start : start + step], batch)
        begins = np.cumsum(batch) - batch
        position = np.arange(len(mask)) - np.repeat(begins, batch)
        conversations = np.flatnonzero((position == 0) | (mask == REJECTED))
        is_target = (mask == 1) & (position > 0) & (position < length)  # the first token is none
        untargeted = conversations[~np.logical_or.reduceat(is_target, conversations)]
        count += len(np.unique(np.searchsorted(begins, untargeted, side="right")))
    return count


def pack(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Best-fit decreasing bin packing of `lengths`, int64 [documents], each in [1, capacity].

    Returns documents, int64 [documents], ordered by row, then by index, and row_offsets, int64 [rows + 1]: row r holds
    documents[row_offsets[r] : row_offsets[r + 1]].
    """
    order = np.argsort(-lengths, kind="stable")
    rows = np.empty(len(lengths), np.int64)
    rows_by_space: list[list[int]] = [[] for _ in range(capacity + 1)]  # rows by remaining space
    nonempty = 0  # bit s: rows_by_space[s] is not empty
    count = 0
    for document, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        fitting = nonempty >> length
        if fitting:
            space = length + (fitting & -fitting).bit_length() - 1  # the least that is enough
            row = rows_by_space[space].pop()
            if not rows_by_space[space]:
                nonempty ^= 1 << space
        else:
            space, row = capacity, count
            count += 1
        rows[document] = row
        if space > length:
            rows_by_space[space - length].append(row)
            nonempty |= 1 << (space - length)
    return np.argsort(rows, kind="stable"), np.concatenate([[0], np.cumsum(np.bincount(rows))])
