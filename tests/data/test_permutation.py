import numpy as np
import pytest

from lemur_jax.data.permutation import key_of, permute


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 16, 17, 1000, 65_536, 100_003])
def test_permute_is_a_permutation(size):
    for tweak in (0, 1, 2**40):
        out = permute(np.arange(size), size, 77, np.full(size, tweak))
        np.testing.assert_array_equal(np.sort(out), np.arange(size))


def test_permute_of_a_vast_domain():
    values = np.random.default_rng(0).integers(0, 2**59, 10_000)
    out = permute(values, 2**59 + 1, 5, np.zeros(10_000, np.int64))
    assert out.min() >= 0
    assert out.max() <= 2**59
    assert len(np.unique(out)) == len(np.unique(values))


@pytest.mark.parametrize("size", [5, 100])
def test_permutations_are_uniform(size):
    # Where each value goes over 4,000 epochs, and where pairs go: chi-squared against equal chances.
    epochs = np.arange(4000)
    out = [permute(np.full(4000, value), size, 1, epochs) for value in range(5)]
    for sent in [*out, (out[1] - out[0]) % size, (out[4] - out[2]) % size]:
        counts = np.bincount(sent, minlength=size)
        expected = counts[counts > 0].mean()  # a difference is never 0
        assert ((counts[counts > 0] - expected) ** 2 / expected).sum() < size + 5 * np.sqrt(2 * size)


def test_the_order_is_pinned():
    # A resumed run must see what the first one saw. If this fails, old runs can no longer be resumed.
    out = permute(np.arange(10), 10, 42, np.zeros(10, np.int64))
    assert out.tolist() == [1, 8, 7, 6, 3, 5, 9, 0, 4, 2]
    assert key_of("rows", 42, "code") == 13628831124297629693
