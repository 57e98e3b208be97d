"""The order in which rows come: how well it is mixed, and that a late step costs what an early one does."""

import tracemalloc

import numpy as np
import pytest

from lemur_jax.data.config import StageConfig
from lemur_jax.data.mixture import Mixture, Source
from lemur_jax.data.rows import ConcatRows, FitRows
from tests.helpers.fake_rows import FakeRows

LENGTH = 4096
DOCUMENTS = 1_000_000
SHARDS = 1000  # of 1,000 documents each
BATCH = 128


@pytest.fixture(scope="module")
def shard_of_row():
    """The shard of the document that each row of T = 4096 begins in, for lengths as code has them."""
    lengths = (
        np.random.default_rng(0).lognormal(np.log(700), 1.3, DOCUMENTS).astype(np.int64).clip(8, 200_000)
    )
    ends = np.cumsum(lengths)
    firsts = np.arange(-(-(ends[-1] - 1) // LENGTH)) * LENGTH
    return np.searchsorted(ends, firsts, "right") // (DOCUMENTS // SHARDS)


def batches_of_epoch(rows, epoch):
    """The row indices of the batches of 128 that make up an epoch, int64 [batches, B]."""
    # Large batches see the same rows as small ones (test_mixture.py), and are located faster.
    mixture = Mixture([Source(name="code", rows=rows, share=1.0)], seed=42, batch_rows=64 * BATCH)
    first, last = epoch * len(rows) // (64 * BATCH) + 1, (epoch + 1) * len(rows) // (64 * BATCH)
    found = np.concatenate([mixture.locate(step)[1] for step in range(first, last)])
    return found.reshape(-1, BATCH)


def same_shard_pairs(shards, distance):
    return int(np.count_nonzero(shards[:, distance:] == shards[:, :-distance]))


@pytest.mark.parametrize("epoch", [0, 1, 300])
def test_neighbours_are_from_one_shard_no_more_often_than_chance_says(shard_of_row, epoch):
    count = len(shard_of_row)
    rows = batches_of_epoch(FakeRows(count, LENGTH, LENGTH), epoch)
    assert len(np.unique(rows)) == rows.size > 0.9 * count
    sizes = np.bincount(shard_of_row)
    chance = (sizes / count * (sizes - 1) / (count - 1)).sum()
    shards = shard_of_row[rows]
    for distance in (1, 2, 64):
        pairs = shards[:, distance:].size
        # A Poisson variable: five standard deviations are one in three million.
        assert same_shard_pairs(shards, distance) <= pairs * chance + 5 * np.sqrt(pairs * chance)
    # Nor are rows that lie side by side in the store neighbours in a batch.
    assert np.count_nonzero(np.abs(np.diff(rows)) == 1) <= 2 + 5 * np.sqrt(2)
    # All pairs of a batch, wherever they stand in it; each is counted twice, which doubles the variance.
    together = sum(int((n * (n - 1)).sum()) for n in map(np.bincount, shards))
    expected = len(rows) * BATCH * (BATCH - 1) * chance
    assert abs(together - expected) <= 5 * np.sqrt(2 * expected)
    # The count would see an order that is not mixed.
    unmixed = shard_of_row[np.sort(rows, axis=None).reshape(rows.shape)]
    assert same_shard_pairs(unmixed, 1) > 100 * same_shard_pairs(shards, 1)


class CountedArray:
    """A TensorStore array that notes how many elements each read asks for."""

    def __init__(self, array, reads):
        self._array, self._reads = array, reads

    def __getattr__(self, name):
        return getattr(self._array, name)

    def __getitem__(self, index):
        part = self._array[index]
        self._reads.append(part.size)
        return part


@pytest.mark.parametrize("rows_of", [ConcatRows, FitRows])
def test_a_late_step_costs_what_the_first_one_costs(make_store, random_documents, rows_of):
    store = make_store(random_documents(2000, 40))
    reads: list[int] = []

    def batch_at(step):
        """Number of reads, elements read and bytes allocated, from an open store to a batch."""
        reads.clear()
        tracemalloc.start()
        rows = rows_of(store, 24)
        stages = [("anneal", StageConfig(step=900_000, shares={"late": 1.0, "code": 1.0}))]
        sources = [Source(name=name, rows=rows, share=1.0) for name in ("code", "late")]
        mixture = Mixture(sources, seed=7, batch_rows=64, stages=stages)
        mixture.read(*mixture.locate(step))
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return len(reads), sum(reads), peak

    batch_at(0)  # what is imported and kept on the first use
    store._arrays = {name: CountedArray(array, reads) for name, array in store._arrays.items()}
    first, later = batch_at(0), [batch_at(step) for step in (1, 899_999, 900_000, 1_000_000, 10**9)]
    assert first[0] >= 2
    for count, elements, peak in later:
        # Rows hold more documents or fewer; nothing grows with the step.
        assert count <= 1.2 * first[0]
        assert elements <= 1.2 * first[1]
        assert peak <= 1.2 * first[2]
