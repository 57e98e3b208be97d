"""Digests against the sum of the module's docstring, in Python's own integers."""

import jax
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lemur_jax.checkpoint import digest
from lemur_jax.checkpoint.digest import RunningDigest, leaf_digests
from lemur_jax.common.errors import UserError

DTYPES = [np.float32, ml_dtypes.bfloat16, np.float16, np.int32]


@pytest.fixture(params=["on the host", "by a program"])
def place(request, monkeypatch):
    """Where arrays are reduced; the other way fails."""
    monkeypatch.setattr(digest, "_PIECE", 65536)
    if request.param == "by a program":
        monkeypatch.setattr(digest, "on_host", lambda array: False)
    monkeypatch.setattr(
        digest, "_reduce_on_devices" if request.param == "on the host" else "_reduce_on_host", None
    )


def reference(array):
    """u(j) = (m ^ m >> 15) | 1 with m = j * 0x9E3779B1 mod 2^32; v(b) = 2 b + 1."""
    bits = np.frombuffer(array.tobytes(), f"u{array.dtype.itemsize}").tolist()
    total = 0
    for i, x in enumerate(bits):
        m = (i % 65536) * 0x9E3779B1 % 2**32
        total += x * ((m ^ m >> 15) | 1) * (2 * (i // 65536) + 1)
    return total % 2**32


def values(shape, dtype):
    return (np.random.default_rng(0).standard_normal(shape) * 100).astype(dtype)


def running(array, *cuts):
    found = RunningDigest()
    for block in np.split(array.reshape(-1), cuts):
        found.update(block)
    return found.value


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (7,), (3, 40, 1024)])
def test_is_the_sum_it_says(dtype, shape, place):
    array = values(shape, dtype)
    assert running(array) == reference(array)
    (leaf,) = leaf_digests({"x": array}, "here").values()
    assert (leaf.shape, leaf.dtype, leaf.digest) == (shape, str(array.dtype), reference(array))


def test_is_the_same_in_any_blocks_and_on_any_mesh(place):
    array = values((8, 64, 256), np.float32)
    expected = reference(array)
    assert running(array, 1, 65535, 65537, 130000) == expected
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("a", "b"))
    for spec in [("a", "b"), (None, "b", "a"), (("a", "b"),), ()]:
        placed = jax.device_put(array, NamedSharding(mesh, PartitionSpec(*spec)))
        assert leaf_digests({"x": placed}, "here")["x"].digest == expected


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_names_what_is_not_finite(bad, place):
    array = values((4, 5), np.float32)
    array[2, 3] = bad
    with pytest.raises(UserError, match=r"here: bad has values that are not finite \(1 such"):
        leaf_digests({"good": values((3,), np.float32), "bad": array}, "here")
