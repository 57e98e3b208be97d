"""Batches of token rows on the mesh: few shapes to compile, little padding."""

import jax
import numpy as np
from jax.sharding import NamedSharding

from lemur_jax.infer.session import Session
from lemur_jax.parallel.mesh import platform
from lemur_jax.parallel.rules import batch_shards, spec

# Positions are padded to multiples of UNIT; for accelerators, whose attention kernels need whole registers, of LANES.
UNIT, LANES = 32, 128


def bucket(size: int) -> int:
    """The next of 1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, ...: at most 25% padding."""
    step = 1 << max(0, (size - 1).bit_length() - 3)
    return -(-size // step) * step


def row_shards(session: Session) -> int:
    """Devices over which the rows of a batch are sharded."""
    return batch_shards(session.mesh)


def chunk_length(session: Session) -> int:
    """The unit of `padded_length`, and the number of tokens of a prompt that are read at a time."""
    on_cpu = platform(session.mesh) == "cpu" and session.compute.attention != "splash"
    return UNIT if on_cpu else LANES


def padded_length(session: Session, size: int) -> int:
    """Positions of a batch whose longest row has `size`."""
    unit = chunk_length(session)
    return unit * bucket(-(-size // unit))


def put(session: Session, array: np.ndarray) -> jax.Array:
    """A batch array on the mesh; every host holds the same NumPy array and passes its own shard."""
    axes = ("batch", "width", "width")[: array.ndim]
    sharding = NamedSharding(session.mesh, spec(session.mesh, axes, array.shape))
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])
