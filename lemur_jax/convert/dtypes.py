"""The three float types of weights, and the cast between them."""

import math

import ml_dtypes
import numpy as np

from lemur_jax.common.errors import UserError

# our name -> (NumPy dtype, code in a safetensors header)
DTYPES: dict[str, tuple[np.dtype, str]] = {
    "float32": (np.dtype(np.float32), "F32"),
    "bfloat16": (np.dtype(ml_dtypes.bfloat16), "BF16"),
    "float16": (np.dtype(np.float16), "F16"),
}

# Side of the tiles of a transposition: 2 to 4 GB/s where NumPy alone gives 0.2.
_TILE = 256


def numpy_dtype(name: str) -> np.dtype:
    """The NumPy dtype of a name in `DTYPES`; UserError for another name."""
    if name not in DTYPES:
        raise UserError(f"unknown dtype {name!r}: it must be one of {', '.join(DTYPES)}")
    return DTYPES[name][0]


def copy_cast(target: np.ndarray, source: np.ndarray, name: str) -> None:
    """Copies `source` into `target` of the same shape, rounding to nearest even where target's dtype is narrower.

    Raises UserError, naming the tensor, if a finite value became infinite.
    """
    if target.dtype == source.dtype:
        uint = f"u{target.dtype.itemsize}"  # NumPy copies bfloat16 element by element, integers at once
        _copy(target.view(uint), source.view(uint))
        return
    with np.errstate(over="ignore"):
        _copy(target, source)
    if target.dtype == np.float32:
        return
    overflown = np.isinf(target)
    if overflown.any() and not np.array_equal(overflown, np.isinf(source)):
        largest = np.max(np.abs(source[np.isfinite(source)].astype(np.float32)))
        raise UserError(
            f"{name} has a value of {largest:.6g}, more than {target.dtype.name} can hold"
            f" ({float(ml_dtypes.finfo(target.dtype).max):.6g}): use bfloat16 or float32"
        )


def _copy(target: np.ndarray, source: np.ndarray) -> None:
    """Copies with a cast; a transposed source in tiles that fit the cache."""
    flat = None if source.flags.c_contiguous else _as_matrix(source)
    if flat is None:
        np.copyto(target, source, casting="unsafe")
        return
    matrix = target.reshape(flat.shape)
    # Padded rows: with a stride that is a power of two a column would share few cache lines.
    buffer = np.empty((_TILE, _TILE + 24), source.dtype)
    for column in range(0, flat.shape[1], _TILE):
        for row in range(0, flat.shape[0], _TILE):
            tile = flat[row : row + _TILE, column : column + _TILE].T
            block = buffer[: tile.shape[0], : tile.shape[1]]
            block[...] = tile
            np.copyto(matrix[row : row + _TILE, column : column + _TILE], block.T, casting="unsafe")


def _as_matrix(array: np.ndarray) -> np.ndarray | None:
    """The array with its axes joined into two, as a view; None if that needs a copy."""
    for axis in range(1, array.ndim):
        joined = array.reshape(math.prod(array.shape[:axis]), -1)
        if np.may_share_memory(joined, array):
            return joined
    return None
