"""A batch with uneven weights, shared by the tests of this room."""

import numpy as np
import pytest

from tests.train.tiny import LENGTH, ROWS, SOURCES


@pytest.fixture(scope="session")
def batch():
    return rows()


def rows():
    """Rows with very different numbers of targets, several documents in each."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 512, (ROWS, LENGTH + 1)).astype(np.int32)
    share = rng.random((ROWS, 1)) ** 3
    segments = np.sort(rng.integers(1, 4, (ROWS, LENGTH)), axis=1).astype(np.int32)
    starts = np.array([[np.argmax(row == segment) for segment in row] for row in segments])
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "loss_weights": (rng.random((ROWS, LENGTH)) < share).astype(np.float32),
        "segment_ids": segments,
        "positions": (np.arange(LENGTH) - starts).astype(np.int32),
        "source_ids": (np.arange(ROWS) % SOURCES).astype(np.int32),
    }
