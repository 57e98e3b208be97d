"""Global batches as sharded JAX arrays, of which each host reads its own rows alone.

Axes: B rows of the global batch, T position in a row.
"""

import queue
import threading
from collections.abc import Generator, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from lemur_jax.data.mixture import Mixture
from lemur_jax.data.rows import Batch, Rows

# Of shape [B, T]; a batch has `source_ids` [B] besides.
BATCH_KEYS = ("tokens", "targets", "loss_weights", "segment_ids", "positions")

_AHEAD = 2  # batches that wait for the train loop


class Loader:
    """Batches of a mixture by step, laid out for a mesh.

    Args:
      mixture: what to read.
      sharding: of arrays [B, T]; it says which rows this process reads.
    """

    def __init__(self, mixture: Mixture, sharding: NamedSharding):
        self.mixture = mixture
        self._layout = _Layout(sharding, mixture.batch_rows, mixture.length)

    def batch(self, step: int) -> dict[str, jax.Array]:
        """The global batch of a step, the same whatever the mesh and the number of hosts.

        Returns:
          tokens, targets, segment_ids, positions: int32 [B, T]; loss_weights: float32 [B, T], as of
          `Rows.read`; source_ids: int32 [B], indices into `mixture.sources`.
        """
        source_ids, row_indices = self.mixture.locate(step)
        mine = self._layout.rows
        return self._layout.place(self.mixture.read(source_ids[mine], row_indices[mine]), source_ids[mine])

    def documents(self, step: int) -> list[str]:
        """`source/document` for each document in the batch of a step."""
        return self.mixture.documents(step)

    def iterate(self, start_step: int, stop_step: int) -> Iterator[tuple[int, dict[str, jax.Array]]]:
        """(step, batch) for each step in order, read ahead by a thread that ends with the iterator."""
        return _read_ahead(((step, self.batch(step)) for step in range(start_step, stop_step)), _AHEAD)


def held_out_batches(
    rows: Rows, batch_rows: int, sharding: NamedSharding, max_rows: int = 0
) -> Generator[dict[str, jax.Array], None, None]:
    """Every row once, in order, as batches like `Loader.batch`'s; read ahead by a thread.

    Every host gets the same number of batches: ceil(number of rows / batch_rows). The last one is filled
    up with rows of padding, of weight 0. `source_ids` are 0.

    Args:
      max_rows: only the first so many rows; 0: all.
    """
    layout = _Layout(sharding, batch_rows, rows.length)
    count = min(len(rows), max_rows or len(rows))

    def batch(first: int) -> dict[str, jax.Array]:
        indices = first + layout.rows
        real = indices < count
        # Row 0 stands in for rows past the end, and is blanked.
        read = rows.read(np.where(real, indices, 0))
        blanked = {key: values * real[:, None].astype(values.dtype) for key, values in read.items()}
        return layout.place(blanked, np.zeros(len(indices), np.int32))

    return _read_ahead((batch(first) for first in range(0, count, batch_rows)), _AHEAD)


class _Layout:
    """Which rows of a global batch this process holds, and how it makes arrays of them.

    Attributes:
      rows: int64 [rows of this process], sorted indices into the batch.
    """

    def __init__(self, sharding: NamedSharding, batch_rows: int, length: int):
        self._shape = (batch_rows, length)
        self._sharding = sharding
        spec = sharding.spec
        self._row_sharding = NamedSharding(sharding.mesh, PartitionSpec(spec[0] if len(spec) else None))
        shards = sharding.addressable_devices_indices_map(self._shape).values()
        held = np.zeros(batch_rows, bool)
        for row_slice, _ in shards:
            held[row_slice] = True
        self.rows = np.flatnonzero(held)
        self._place = np.cumsum(held) - 1  # where a row of the batch is among `rows`

    def place(self, batch: Batch, source_ids: np.ndarray) -> dict[str, jax.Array]:
        """Arrays of the whole batch out of this process' rows of it."""
        placed = {key: self._array(batch[key], self._shape, self._sharding) for key in BATCH_KEYS}
        placed["source_ids"] = self._array(source_ids, self._shape[:1], self._row_sharding)
        return placed

    def _array(self, local: np.ndarray, shape: tuple[int, ...], sharding: NamedSharding) -> jax.Array:
        def shard(index: tuple[slice, ...]) -> np.ndarray:
            return local[(self._place[index[0]], *index[1:])]

        return jax.make_array_from_callback(shape, sharding, shard)


def _read_ahead(items: Iterator, depth: int) -> Generator[Any, None, None]:
    """The same items, made by a thread up to `depth` of them ahead; an error in it is raised here."""
    ready: queue.Queue = queue.Queue(depth)
    stop = threading.Event()

    def put(entry: tuple) -> bool:
        # Wakes up now and then: the reader may have gone.
        while not stop.is_set():
            try:
                ready.put(entry, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        try:
            for item in items:
                if not put((item, None)):
                    return
            put((None, StopIteration()))
        except BaseException as error:
            put((None, error))

    thread = threading.Thread(target=work, name="read-ahead", daemon=True)
    thread.start()
    try:
        while True:
            item, error = ready.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield item
    finally:
        stop.set()
        thread.join()
