"""One-dimensional arrays on disk or gs://, written by appending and read at random.

Zarr3 through TensorStore. The unit of a read is a compressed chunk with its CRC-32C; a file is a shard of many chunks,
whose index has a CRC-32C too. TensorStore returns no values that do not match. `metadata_digest` covers `zarr.json`.
"""

import functools
import hashlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath

from lemur_jax.common.errors import UserError, reason_of
from lemur_jax.common.paths import store_url

_CHUNK = 1 << 12  # elements decompressed by the smallest read
_SHARD_BYTES = 1 << 25
# An attribute: every chunk is stored, even chunks of zeros, so a missing one is an error.
_COMPLETE = "complete"
# Elements. Shorter spans are read faster by one read with an index array, longer ones by a read each.
_SHORT = 512
_MAPPED = 1 << 20  # elements copied together
_CACHE_BYTES = 128 << 20  # of decompressed chunks, for all arrays of this process


def open_array(path: epath.Path, *, digest: str = "", cache: bool = True):
    """A future of the `tensorstore.TensorStore` at `path`, for reading.

    `digest` is what `metadata_digest` was when the array was written, "" if not known; without `cache` it is read once
    from end to end. Raises ValueError for missing or damaged metadata; other damage raises where the future or a read
    is awaited.
    """
    import tensorstore as ts

    try:
        metadata = (path / "zarr.json").read_bytes()
    except OSError as error:
        raise ValueError(f"{path}/zarr.json cannot be read: {reason_of(error)}") from error
    if digest and hashlib.sha256(metadata).hexdigest() != digest:
        raise ValueError(f"{path}/zarr.json does not match the digest in the manifest")
    spec = {
        "driver": "zarr3",
        "kvstore": store_url(path),
        "recheck_cached_data": "open",
        # A missing file must not be read as zeros.
        "fill_missing_data_reads": not json.loads(metadata).get("attributes", {}).get(_COMPLETE, False),
    }
    return ts.open(spec, context=_context() if cache else ts.Context(), read=True)


def metadata_digest(path: epath.Path) -> str:
    """sha256 (hex) of an array's `zarr.json`: its length, type and codecs."""
    return hashlib.sha256((path / "zarr.json").read_bytes()).hexdigest()


def finish(read: Any) -> np.ndarray:
    """The values of a read that was started; UserError: a file is missing, or does not match its checksum."""
    try:
        return read.result()
    except ValueError as error:
        raise UserError(
            f"a token store cannot be read: {reason_of(error)}; restore the file from a copy, or prepare the store"
            " again"
        ) from error


def map_array(path: epath.PathLike, array: Any, shape: tuple[int, ...]) -> np.ndarray:
    """The first elements of an array, copied into a new local file that is mapped into memory."""
    mapped = np.memmap(path, array.dtype.numpy_dtype, "w+", shape=shape).view(np.ndarray)
    flat = mapped.reshape(-1)
    for start in range(0, flat.size, _MAPPED):
        stop = min(start + _MAPPED, flat.size)
        flat[start:stop] = finish(array[start:stop].read())
    return mapped


def read_spans(array: Any, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """[start, start + length) of an array for each span, concatenated."""
    starts = np.asarray(starts)
    stops = starts + lengths
    cuts = np.flatnonzero(starts[1:] != stops[:-1])  # adjacent spans are one read
    starts, stops = np.append(starts[:1], starts[1:][cuts]), np.append(stops[:-1][cuts], stops[-1:])
    lengths = stops - starts
    total = int(lengths.sum())
    if total < _SHORT * len(starts):
        ends = np.cumsum(lengths)
        return finish(array[np.arange(total) + np.repeat(starts - (ends - lengths), lengths)].read())
    reads = [array[a:b].read() for a, b in zip(starts.tolist(), stops.tolist(), strict=True)]
    return np.concatenate([finish(read) for read in reads])


def read_bounds(offsets: Any, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(start, length) of elements, from an array of all starts and the end of the last one."""
    ones = np.ones(len(indices), np.int64)
    starts, stops = (read_spans(offsets, np.asarray(indices) + shift, ones) for shift in (0, 1))
    return starts, stops - starts


class ArrayWriter:
    """Appends to a one-dimensional array of unknown length, a whole shard at a time.

    With `length` it continues a saved array after this many elements. A shard, one file, has `shard_bytes` before
    compression (0: 32 MiB); twice as much may be in memory.
    """

    def __init__(self, path: epath.Path, dtype: str, length: int | None = None, shard_bytes: int = 0):
        import tensorstore as ts

        self.dtype = np.dtype(dtype)
        self._shard = (shard_bytes or _SHARD_BYTES) // self.dtype.itemsize
        spec = _create_spec(path, self.dtype, self._shard)
        self._array = ts.open(spec, create=length is None, open=length is not None).result()
        self._buffer = np.empty(self._shard, self.dtype)
        self._count = (length or 0) % self._shard  # elements in the buffer
        self._written = (length or 0) - self._count
        self._write: Any = None
        if self._count:
            self._buffer[: self._count] = self._array[self._written : length].read().result()

    def save(self) -> int:
        """Writes what was appended so far, and returns the array's length."""
        if self._write is not None:
            self._write.result()
        stop = self._written + self._count
        self._array[self._written : stop].write(self._buffer[: self._count]).result()
        return stop

    def append(self, values: Sequence[int] | np.ndarray) -> None:
        while len(values):
            block = values[: self._shard - self._count]
            self._buffer[self._count : self._count + len(block)] = block
            self._count += len(block)
            values = values[len(block) :]
            if self._count == self._shard:
                self._flush()

    def _flush(self) -> None:
        """Starts to write the buffer, once the write before it is done, and takes a new one."""
        if self._write is not None:
            self._write.result()
        stop = self._written + self._count
        self._write = self._array[self._written : stop].write(self._buffer[: self._count])
        self._buffer = np.empty_like(self._buffer)
        self._written, self._count = stop, 0

    def close(self) -> None:
        self._flush()
        self._write.result()
        self._array.resize(exclusive_max=[self._written], resize_metadata_only=True).result()


def _create_spec(path: epath.Path, dtype: np.dtype, shard: int) -> dict[str, Any]:
    little_endian = {"name": "bytes", "configuration": {"endian": "little"}}
    checksum = {"name": "crc32c"}
    sharding = {
        "chunk_shape": [_CHUNK],
        "codecs": [little_endian, {"name": "zstd", "configuration": {"level": 3}}, checksum],
        "index_codecs": [little_endian, checksum],
    }
    return {
        "driver": "zarr3",
        "kvstore": store_url(path),
        "store_data_equal_to_fill_value": True,
        "metadata": {
            "attributes": {_COMPLETE: True},
            "shape": [1 << 50],  # an upper bound; `close` sets the length
            "data_type": dtype.name,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [shard]}},
            "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
        },
    }


@functools.cache
def _context():
    """One TensorStore context, so that its cache is bounded for all stores together."""
    import tensorstore as ts

    return ts.Context({"cache_pool": {"total_bytes_limit": _CACHE_BYTES}})
