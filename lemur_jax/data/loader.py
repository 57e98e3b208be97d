"""Global batches as sharded JAX arrays; each host reads only its own rows.

Axes: B rows of the global batch, T position in a row.
"""

import collections
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from lemur_jax.data.mixture import Mixture
from lemur_jax.data.permutation import key_of, permute
from lemur_jax.data.rows import Batch, Rows

# Of shape [B, T]; a batch also has `source_ids` [B].
BATCH_KEYS = ("tokens", "targets", "loss_weights", "segment_ids", "positions")

_AHEAD = 3  # batches that are ready, or being read, while the train loop uses one

T = TypeVar("T")


class Loader:
    """Batches of a mixture by step, laid out for a mesh.

    `sharding` is of arrays [B, T] and says which rows this process reads.
    """

    def __init__(self, mixture: Mixture, sharding: NamedSharding):
        self.mixture = mixture
        self._layout = _Layout(sharding, mixture.batch_rows, mixture.length)

    def batch(self, step: int) -> dict[str, jax.Array]:
        """The global batch of a step, the same for any mesh and number of hosts.

        Returns:
          tokens, targets, segment_ids, positions: int32 [B, T]; loss_weights: float32 [B, T], as of
          `Rows.read`; source_ids: int32 [B], indices into `mixture.sources`.
        """
        source_ids, row_indices = self.mixture.locate(step)
        local = self._layout.rows
        return self._layout.place(self.mixture.read(source_ids[local], row_indices[local]), source_ids[local])

    def iterate(
        self, start_step: int, stop_step: int
    ) -> Generator[tuple[int, dict[str, jax.Array]], None, None]:
        """(step, batch) for each step in order; a thread that ends with the iterator reads ahead."""
        return _read_ahead(lambda step: (step, self.batch(step)), range(start_step, stop_step))


def held_out_batches(
    rows: Rows, batch_rows: int, sharding: NamedSharding, max_rows: int = 0
) -> Generator[dict[str, jax.Array], None, None]:
    """Every row once, or those of `chosen_rows`, as batches like `Loader.batch`'s; read ahead by a thread.

    Every host gets ceil(number of rows / batch_rows) batches; the last one is filled up with padding of weight 0.
    """
    layout = _Layout(sharding, batch_rows, rows.length)
    chosen = chosen_rows(len(rows), max_rows)
    count = len(chosen)

    def batch(start: int) -> dict[str, jax.Array]:
        indices = start + layout.rows
        exists = indices < count
        # The first row stands in for rows past the end, and is blanked.
        data = rows.read(chosen[np.where(exists, indices, 0)])
        masked = {key: values * exists[:, None].astype(values.dtype) for key, values in data.items()}
        return layout.place(masked, np.zeros(len(indices), np.int32))

    return _read_ahead(batch, range(0, count, batch_rows))


def chosen_rows(count: int, max_rows: int) -> np.ndarray:
    """The rows that are scored, int64, ascending: all, or `max_rows` of `count` by a fixed permutation."""
    if not 0 < max_rows < count:
        return np.arange(count)
    positions = np.arange(max_rows)
    return np.sort(permute(positions, count, key_of("held-out rows"), np.zeros_like(positions)))


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
        is_local = np.zeros(batch_rows, bool)
        for row_slice, _ in shards:
            is_local[row_slice] = True
        self.rows = np.flatnonzero(is_local)
        self._place = np.cumsum(is_local) - 1  # where a row of the batch is among `rows`

    def place(self, batch: Batch, source_ids: np.ndarray) -> dict[str, jax.Array]:
        """Arrays of the whole batch out of this process' rows of it."""
        placed = {key: self._array(batch[key], self._shape, self._sharding) for key in BATCH_KEYS}
        placed["source_ids"] = self._array(source_ids, self._shape[:1], self._row_sharding)
        return placed

    def _array(self, local: np.ndarray, shape: tuple[int, ...], sharding: NamedSharding) -> jax.Array:
        def shard(index: tuple[slice, ...]) -> np.ndarray:
            return local[(self._place[index[0]], *index[1:])]

        return jax.make_array_from_callback(shape, sharding, shard)


def _read_ahead(read: Callable[[int], T], keys: Iterable[int]) -> Generator[T, None, None]:
    """`read(key)` of each key in order; a thread reads `_AHEAD` of them ahead."""
    pool = ThreadPoolExecutor(1, thread_name_prefix="read-ahead")
    pending: collections.deque[Future[T]] = collections.deque()
    try:
        for key in keys:
            pending.append(pool.submit(read, key))
            if len(pending) > _AHEAD:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
