"""Digests of arrays: the same number wherever an array lies and in whatever pieces it is read.

The digest of an array is, modulo 2^32,

    sum over i of bits(x[i]) * u(i mod 65536) * v(i div 65536 mod 65536)

where i counts elements in row-major order, bits(x) is the element's bit pattern and u and v are odd. Odd
numbers have inverses modulo 2^32, so any change of one element changes the digest; changes of several
go unseen once in 2^32. Sums of integers do not depend on their order: accelerators compute it over sharded
arrays in one pass, and the host over blocks that stream by, or over several at once.
"""

import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lemur_jax.checkpoint.leaves import on_host

_BLOCK = 1 << 16
_PIECE = 64 * _BLOCK  # elements that a thread of the host takes at a time
_MIX = 0x9E3779B1  # 2^32 / golden ratio: neighbours get unlike weights


def _inner(j: Any) -> Any:
    """u(j), for uint32 arrays of NumPy or JAX."""
    mixed = j * np.uint32(_MIX)
    return (mixed ^ (mixed >> np.uint32(15))) | np.uint32(1)


_TABLE = _inner(np.arange(_BLOCK, dtype=np.uint32))


class RunningDigest:
    """The digest of an array that passes by in row-major blocks.

    Args:
      index: of the first element, where the array does not pass by as a whole: digests of its parts add up.
    """

    def __init__(self, index: int = 0) -> None:
        self._sum = 0
        self._index = index

    def update(self, block: np.ndarray) -> None:
        """Takes the next elements; any dtype of 1, 2 or 4 bytes, C-contiguous."""
        bits = block.reshape(-1).view(f"u{block.dtype.itemsize}")
        words = np.empty(min(_BLOCK, bits.size), np.uint32)
        position = 0
        while position < bits.size:
            start = self._index % _BLOCK
            count = min(_BLOCK - start, bits.size - position)
            part = words[:count]
            np.multiply(bits[position : position + count], _TABLE[start : start + count], out=part)
            self._sum += int(part.sum(dtype=np.uint32)) * (2 * (self._index // _BLOCK % _BLOCK) + 1)
            self._index += count
            position += count

    @property
    def value(self) -> int:
        return self._sum % (1 << 32)


def start(leaves: Mapping[str, Any]) -> Callable[[], tuple[dict[str, int], list[str]]]:
    """Digests of arrays where they lie.

    Args:
      leaves: `jax.Array`s, sharded in any way, or NumPy arrays. On accelerators the work begins now, and they may be
        donated; what lies in the host's memory is read when the result is asked for.

    Returns:
      What gives the digests, and the names of the arrays that have a value that is not finite.
    """
    if all(map(_is_here, leaves.values())):
        return lambda: _result(*_measure_on_host(leaves))
    started = _measure(dict(leaves))
    if any(map(on_host, leaves.values())):
        # CPU devices run programs side by side, and collectives of two of them can wait for each other for ever.
        jax.block_until_ready(started)
    return lambda: _result(*jax.device_get(started))


def _result(digests: Mapping[str, Any], finite: Mapping[str, Any]) -> tuple[dict[str, int], list[str]]:
    return {name: int(value) for name, value in digests.items()}, [n for n, ok in finite.items() if not ok]


def _is_here(leaf: Any) -> bool:
    return on_host(leaf) and (not isinstance(leaf, jax.Array) or leaf.is_fully_addressable)


def _measure_on_host(leaves: Mapping[str, Any]) -> tuple[dict[str, int], dict[str, bool]]:
    digests, finite = {}, {}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for name, leaf in leaves.items():
            flat = _gathered(leaf).reshape(-1)
            pieces = list(pool.map(partial(_measure_piece, flat), range(0, flat.size, _PIECE)))
            digests[name] = sum(digest for digest, _ in pieces) % (1 << 32)
            finite[name] = all(ok for _, ok in pieces)
    return digests, finite


def _gathered(leaf: Any) -> np.ndarray:
    if not isinstance(leaf, jax.Array):
        return np.ascontiguousarray(leaf)
    if leaf.is_fully_replicated:
        return np.asarray(leaf.addressable_shards[0].data)
    # What JAX makes of a sharded array it keeps for as long as the array lives.
    whole = np.empty(leaf.shape, leaf.dtype)
    for shard in leaf.addressable_shards:
        if shard.replica_id == 0:
            whole[shard.index] = shard.data
    return whole


def _measure_piece(flat: np.ndarray, index: int) -> tuple[int, bool]:
    piece, digest = flat[index : index + _PIECE], RunningDigest(index)
    digest.update(piece)
    return digest.value, bool(np.isfinite(piece).all())


@jax.jit
def _measure(leaves: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    return (
        {name: _digest(leaf) for name, leaf in leaves.items()},
        {name: _reduced(jnp.all, jnp.isfinite(leaf)) for name, leaf in leaves.items()},
    )


def _digest(leaf: Any) -> Any:
    bits = jax.lax.bitcast_convert_type(leaf, f"uint{8 * leaf.dtype.itemsize}").astype(jnp.uint32)
    index = jnp.zeros(leaf.shape, jnp.uint32)
    stride = 1
    for axis in reversed(range(leaf.ndim)):
        index += jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis) * np.uint32(stride % (1 << 32))
        stride *= leaf.shape[axis]
    outer = (index >> np.uint32(16)) * np.uint32(2) + np.uint32(1)
    return _reduced(partial(jnp.sum, dtype=jnp.uint32), bits * _inner(index & np.uint32(_BLOCK - 1)) * outer)


def _reduced(reduction: Callable[..., Any], array: Any) -> Any:
    """Reduces all axes, one after the other: XLA:CPU gives a reduction to a scalar to one thread."""
    for axis in reversed(range(array.ndim)):
        array = jax.lax.optimization_barrier(reduction(array, axis=axis))
    return array
