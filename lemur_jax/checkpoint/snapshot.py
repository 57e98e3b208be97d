"""The state as it is now, to be written while training goes on and writes over it."""

import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from lemur_jax.checkpoint.leaves import on_host

# As XLA wants the arrays that it is to use where they lie.
_ALIGNMENT = 64


def snapshot(tree: Any) -> Any:
    """The tree with every array that lies in the host's memory, on a CPU device, copied.

    Orbax copies from accelerators to the host. What a CPU device holds is there already: Orbax would read it in place,
    and the next update, which wants to write its results over it, would first have to copy it, one array after the
    other and beside the threads that write.

    Args:
      tree: of `jax.Array`s, sharded in any way; only the shards of this process are copied.
    """
    leaves, structure = jax.tree.flatten(tree)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return jax.tree.unflatten(structure, pool.map(_apart, leaves))


def _apart(array: Any) -> Any:
    if not on_host(array):
        return array
    pieces = [jax.device_put(_copy(shard.data), shard.data.sharding) for shard in array.addressable_shards]
    return jax.make_array_from_single_device_arrays(array.shape, array.sharding, pieces)


def _copy(data: jax.Array) -> np.ndarray:
    """The values in new memory that lies so that `device_put` takes it as it is.

    NumPy asks the system for large pages, which makes this faster than a copy by XLA.
    """
    values = np.asarray(data)
    room = np.empty(values.nbytes + _ALIGNMENT, np.uint8)
    start = -room.ctypes.data % _ALIGNMENT
    own = room[start : start + values.nbytes]
    np.copyto(own, values.reshape(-1).view(np.uint8))  # bytes: NumPy knows no bfloat16
    return own.view(values.dtype).reshape(values.shape)
