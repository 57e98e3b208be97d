"""Writing parameters to a checkpoint piece by piece, so that no array is ever in memory as a whole."""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from etils import epath
from orbax.checkpoint import type_handlers

from lemur_jax.checkpoint.digest import RunningDigest
from lemur_jax.checkpoint.metadata import Leaf, named_leaves, seal
from lemur_jax.common.paths import absolute, store_url


@dataclasses.dataclass(frozen=True, kw_only=True)
class Streamed:
    """An array as a source of its pieces."""

    shape: tuple[int, ...]
    dtype: np.dtype
    pieces: int  # 1, or `shape[0]`: one for each entry of axis 0
    read: Callable[[int], np.ndarray]  # index of a piece -> that piece, C-contiguous, axis 0 included
    digest: RunningDigest = dataclasses.field(default_factory=RunningDigest)  # of what was written so far


def write_params(path: epath.PathLike, params: Any, metadata: Mapping[str, Any], step: int = 0) -> None:
    """Writes a checkpoint of parameters alone, as an import makes it; returns when it is complete.

    `params` is a tree of `Streamed` leaves or of arrays, `metadata` as `make_metadata` returns it.
    """
    params = jax.tree.map(lambda leaf: leaf if isinstance(leaf, Streamed) else _one_piece(leaf), params)

    def sealed() -> dict[str, Any]:
        leaves = {
            name: Leaf(shape=tuple(leaf.shape), dtype=str(leaf.dtype), digest=leaf.digest.value)
            for name, leaf in named_leaves(params).items()
        }
        return seal(metadata, {"params": leaves})

    registry = type_handlers.create_type_handler_registry((Streamed, _StreamedHandler()))
    handlers = {
        "params": ocp.PyTreeCheckpointHandler(use_compression=False, type_handler_registry=registry),
        "metadata": _LateJsonHandler(),
    }
    options = ocp.CheckpointManagerOptions(enable_async_checkpointing=False)
    with ocp.CheckpointManager(absolute(path), options=options, item_handlers=handlers) as manager:
        items = ocp.args.Composite(params=ocp.args.PyTreeSave(params), metadata=_SaveLateJson(sealed))
        manager.save(step, args=items)


def _one_piece(array: Any) -> Streamed:
    array = np.ascontiguousarray(array)
    return Streamed(shape=array.shape, dtype=array.dtype, pieces=1, read=lambda _: array)


class _StreamedHandler(type_handlers.NumpyHandler):
    """Writes `Streamed` arrays in the format of Orbax's NumPy arrays, one piece at a time."""

    async def serialize(
        self, values: Sequence[Streamed], infos: Sequence[type_handlers.ParamInfo], args: Any = None
    ) -> Sequence[ocp.future.Future]:
        """Returns when everything is written: an interrupt or an error ends the save at once."""
        del args
        for value, info in zip(values, infos, strict=True):
            await info.await_path_creation()
            # Orbax merges the stores of all processes when the checkpoint is finalized.
            base = store_url(info.parent_dir / "ocdbt.process_0")
            spec = {
                "driver": "zarr",
                "kvstore": {"driver": "ocdbt", "base": base, "path": f"{info.name}/"},
                "metadata": {"compressor": None},
            }
            _write(value, ts.Spec(spec), info.ts_context)
        return []


def _write(value: Streamed, spec: ts.Spec, context: ts.Context) -> None:
    rows = value.shape[0] // value.pieces if value.pieces > 1 else None
    chunk = value.shape if rows is None else (rows, *value.shape[1:])
    array = ts.open(
        spec,
        create=True,
        shape=value.shape,
        dtype=ts.dtype(value.dtype),
        chunk_layout=ts.ChunkLayout(chunk_shape=chunk),
        context=context,
    ).result()
    pending: list[Any] = []
    with ThreadPoolExecutor(1) as pool:
        try:
            for index in range(value.pieces):
                piece = value.read(index)  # while the previous piece is written and digested
                for future in pending:
                    future.result()
                region = array if rows is None else array[index * rows : (index + 1) * rows]
                pending = [
                    region.write(piece, can_reference_source_data_indefinitely=True),
                    pool.submit(value.digest.update, piece),
                ]
        finally:  # also after an error: the caller then removes the directory
            for future in pending:
                future.result()


class _LateJsonHandler(ocp.CheckpointHandler):
    """Writes JSON when everything else is written: only then are the digests of streamed arrays known."""

    def save(self, directory: epath.Path, args: "_SaveLateJson") -> None:
        """Writes nothing yet."""
        del directory
        self._content = args.content

    def restore(self, directory: epath.Path, args: Any = None) -> Any:
        """Refuses: `ocp.JsonCheckpointHandler` reads what this handler has written."""
        raise TypeError("read this item with orbax.checkpoint.JsonCheckpointHandler")

    def finalize(self, directory: epath.Path) -> None:
        """Called by Orbax when all items are written."""
        (directory / "metadata").write_text(json.dumps(self._content()))


@ocp.args.register_with_handler(_LateJsonHandler, for_save=True, for_restore=True)
@dataclasses.dataclass
class _SaveLateJson(ocp.args.CheckpointArgs):
    content: Callable[[], Any]  # returns the JSON value
