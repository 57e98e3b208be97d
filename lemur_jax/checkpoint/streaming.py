"""Arrays that are written to a checkpoint piece by piece and never exist as a whole."""

import asyncio
import dataclasses
import math
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from orbax.checkpoint import type_handlers

from lemur_jax.checkpoint.digest import RunningDigest

# A chunk of one entry of axis 0: what lies in layers can then be read layer by layer.
BY_LAYER = ocp.SaveArgs(shard_axes=(0,))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Streamed:
    """An array as a source of its pieces.

    Attributes:
      shape: of the whole array.
      dtype: NumPy dtype.
      pieces: 1, or `shape[0]`: one for each entry of axis 0.
      read: number of a piece -> that piece, C-contiguous, axis 0 included.
      digest: of what was written; complete when the checkpoint is.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    pieces: int
    read: Callable[[int], np.ndarray]
    digest: RunningDigest = dataclasses.field(default_factory=RunningDigest)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize


def streamed(array: np.ndarray) -> Streamed:
    """An array at hand, written as one piece."""
    array = np.ascontiguousarray(array)
    return Streamed(shape=array.shape, dtype=array.dtype, pieces=1, read=lambda _: array)


def until(stopped: threading.Event, value: Streamed) -> Streamed:
    """The same, but whoever reads on once `stopped` is set gets an error."""

    def read(piece: int) -> np.ndarray:
        if stopped.is_set():
            raise RuntimeError("stopped")
        return value.read(piece)

    return dataclasses.replace(value, read=read)


class StreamedHandler(type_handlers.NumpyHandler):
    """Writes `Streamed` arrays as Orbax writes NumPy arrays, but one piece at a time."""

    def __init__(self) -> None:
        super().__init__(deepcopy_host_arrays=False)
        self._turn = asyncio.Lock()  # Orbax starts all arrays at once
        self._failed = False

    async def _open_and_write(self, value: Streamed, tspec: dict[str, Any], ts_context: ts.Context) -> None:
        async with self._turn:
            if self._failed:  # the caller may be removing the directory already
                return
            try:
                await _write(value, ts.Spec(tspec), ts_context)
            except BaseException:
                self._failed = True
                raise


async def _write(value: Streamed, spec: ts.Spec, context: ts.Context) -> None:
    array = await ts.open(spec, create=True, open=True, context=context)
    rows = value.shape[0] // value.pieces
    piece = await asyncio.to_thread(value.read, 0)
    for number in range(value.pieces):
        part = array[number * rows : (number + 1) * rows]
        write = part.write(piece, can_reference_source_data_indefinitely=True)
        summed = asyncio.create_task(asyncio.to_thread(value.digest.update, piece))
        try:
            if number + 1 < value.pieces:  # the next is made while this one goes to the disk
                piece = await asyncio.to_thread(value.read, number + 1)
        finally:  # where that fails, too: the caller then removes the directory, into which nothing may be written
            await summed
            await write
