"""Digests of arrays, independent of where an array is stored and in what pieces it is read.

The digest of an array is, modulo 2^32,

    sum over i of bits(x[i]) * u(i mod 65536) * v(i div 65536 mod 65536)

where i counts elements in row-major order, bits(x) is the element's bit pattern and u and v are odd. Odd
numbers have inverses modulo 2^32, so any change of one element changes the digest; a change of several
elements leaves it equal with probability 2^-32. Sums of integers do not depend on their order: accelerators compute it
over sharded arrays in one pass, and the host over blocks as they are read.
"""

import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lemur_jax.checkpoint.metadata import Leaf, named_leaves
from lemur_jax.common.errors import UserError

_BLOCK = 1 << 16
_PIECE = 64 * _BLOCK  # elements per task of the host's threads
_MIX = 0x9E3779B1  # 2^32 / golden ratio: neighbors get very different weights


def _inner(j: Any) -> Any:
    """u(j), for uint32 arrays of NumPy or JAX."""
    mixed = j * np.uint32(_MIX)
    return (mixed ^ (mixed >> np.uint32(15))) | np.uint32(1)


_TABLE = _inner(np.arange(_BLOCK, dtype=np.uint32))


class RunningDigest:
    """The digest of an array that is given in row-major blocks.

    `index` is the position of the first element. Digests of the parts of an array add up.
    """

    def __init__(self, index: int = 0) -> None:
        self._sum = 0
        self._index = index

    def update(self, block: np.ndarray) -> None:
        """Adds the next elements; any dtype of 1, 2 or 4 bytes, C-contiguous."""
        bits = block.reshape(-1).view(f"u{block.dtype.itemsize}")
        buffer = np.empty(min(_BLOCK, bits.size), np.uint32)
        position = 0
        while position < bits.size:
            start = self._index % _BLOCK
            count = min(_BLOCK - start, bits.size - position)
            products = buffer[:count]
            np.multiply(bits[position : position + count], _TABLE[start : start + count], out=products)
            self._sum += int(products.sum(dtype=np.uint32)) * (2 * (self._index // _BLOCK % _BLOCK) + 1)
            self._index += count
            position += count

    @property
    def value(self) -> int:
        return self._sum % (1 << 32)


def leaf_digests(tree: Any, where: str, error: type[UserError] = UserError) -> dict[str, Leaf]:
    """Shape, dtype and digest of every leaf by name. Raises `error`, which names the leaf, if one is not finite.

    Arrays are reduced where they are: on the accelerators, or by threads in the host's memory. All hosts that hold
    parts of the arrays must call it. `where` names the tree in the message.
    """
    leaves = named_leaves(tree)
    if all(on_host(leaf) and getattr(leaf, "is_fully_addressable", True) for leaf in leaves.values()):
        digests, finite = _reduce_on_host(leaves)
    else:
        digests, finite = jax.device_get(_reduce_on_devices(leaves))
    if bad := [name for name, ok in finite.items() if not ok]:
        raise error(f"{where}: {bad[0]} has values that are not finite ({len(bad)} such leaves in all)")
    return {
        name: Leaf(shape=tuple(leaf.shape), dtype=str(leaf.dtype), digest=int(digests[name]))
        for name, leaf in leaves.items()
    }


def on_host(array: Any) -> bool:
    """Whether an array is in the host's memory: NumPy's, or one of CPU devices."""
    devices: set[Any] = array.sharding.device_set if isinstance(array, jax.Array) else set()
    return all(device.platform == "cpu" for device in devices)


def _reduce_on_host(leaves: Mapping[str, Any]) -> tuple[dict[str, int], dict[str, bool]]:
    digests, finite = {}, {}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for name, leaf in leaves.items():
            flat = _gather(leaf).reshape(-1)
            pieces = list(pool.map(partial(_reduce_piece, flat), range(0, flat.size, _PIECE)))
            digests[name] = sum(digest for digest, _ in pieces) % (1 << 32)
            finite[name] = all(ok for _, ok in pieces)
    return digests, finite


def _gather(leaf: Any) -> np.ndarray:
    if not isinstance(leaf, jax.Array):
        return np.ascontiguousarray(leaf)
    if leaf.is_fully_replicated:
        return np.asarray(leaf.addressable_shards[0].data)
    # `np.asarray` of a sharded array would be cached by JAX for as long as the array lives.
    array = np.empty(leaf.shape, leaf.dtype)
    for shard in leaf.addressable_shards:
        if shard.replica_id == 0:
            array[shard.index] = shard.data
    return array


def _reduce_piece(flat: np.ndarray, index: int) -> tuple[int, bool]:
    piece, digest = flat[index : index + _PIECE], RunningDigest(index)
    digest.update(piece)
    return digest.value, bool(np.isfinite(piece).all())


@jax.jit
def _reduce_on_devices(leaves: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    return (
        {name: _digest(leaf) for name, leaf in leaves.items()},
        {name: _reduce(jnp.all, jnp.isfinite(leaf)) for name, leaf in leaves.items()},
    )


def _digest(leaf: Any) -> Any:
    bits = jax.lax.bitcast_convert_type(leaf, f"uint{8 * leaf.dtype.itemsize}").astype(jnp.uint32)
    index = jnp.zeros(leaf.shape, jnp.uint32)
    stride = 1
    for axis in reversed(range(leaf.ndim)):
        index += jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis) * np.uint32(stride % (1 << 32))
        stride *= leaf.shape[axis]
    outer = (index >> np.uint32(16)) * np.uint32(2) + np.uint32(1)
    return _reduce(partial(jnp.sum, dtype=jnp.uint32), bits * _inner(index & np.uint32(_BLOCK - 1)) * outer)


def _reduce(reduction: Callable[..., Any], array: Any) -> Any:
    """Reduces the axes one after another: XLA:CPU runs a reduction to a scalar in one thread."""
    for axis in reversed(range(array.ndim)):
        array = jax.lax.optimization_barrier(reduction(array, axis=axis))
    return array
