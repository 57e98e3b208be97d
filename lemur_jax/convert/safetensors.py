"""Reads and writes safetensors files, one tensor at a time.

The `safetensors` library has no bfloat16 for NumPy and reads only local files, so the format is implemented here:
8 bytes of little-endian header length, a JSON header, then the tensors' bytes without gaps
(https://huggingface.co/docs/safetensors). Nothing in a file is trusted: no number leads to an allocation before it
agrees with the file's size, and no name is used as a path.
"""

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from etils import epath

from lemur_jax.common.errors import UserError
from lemur_jax.common.json_files import write_json
from lemur_jax.common.paths import is_object_store, recovery_hint
from lemur_jax.convert import layout
from lemur_jax.convert.dtypes import DTYPES

INDEX = "model.safetensors.index.json"
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit
# One stream from an object store is much slower than several.
_PIECE_BYTES = 16 << 20
_STREAMS = 16
_DTYPES = {code: dtype for dtype, code in DTYPES.values()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """A tensor in a file that is not read yet."""

    name: str
    path: epath.Path
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int  # of its first byte in the file

    def read(self) -> np.ndarray:
        """The tensor, read-only; a local file is mapped at each call, so that its pages leave memory with the array."""
        if not is_object_store(self.path):
            return np.memmap(self.path, self.dtype, mode="r", offset=self.offset, shape=self.shape)
        data = np.empty(math.prod(self.shape) * self.dtype.itemsize, np.uint8)

        def fill(start: int) -> None:
            piece = data[start : start + _PIECE_BYTES]
            with self.path.open("rb") as file:
                file.seek(self.offset + start)
                read = file.read(len(piece))
            if len(read) < len(piece):
                raise UserError(
                    f"{self.path} has become shorter while it was read: copy or download it again"
                )
            piece[:] = np.frombuffer(read, np.uint8)

        with ThreadPoolExecutor(_STREAMS) as pool:
            list(pool.map(fill, range(0, len(data), _PIECE_BYTES)))
        return data.view(self.dtype).reshape(self.shape)

    def rows(self, name: str, start: int, stop: int) -> "StoredTensor":
        """Some rows of a matrix as a tensor of its own: only their bytes are read."""
        offset = self.offset + start * self.shape[1] * self.dtype.itemsize
        return dataclasses.replace(self, name=name, shape=(stop - start, self.shape[1]), offset=offset)


def brief(name: object) -> str:
    """A name from a file, shortened and escaped for one line of a message."""
    text = str(name)
    text = text if len(text) <= 120 else text[:117] + "..."
    return "".join(char if char.isprintable() else "?" for char in text)


def read_header(path: epath.PathLike) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file, without buffers that no model needs (`layout.IGNORED`).

    Raises UserError: the file is incomplete, its header violates the format, or a tensor is not float32, bfloat16 or
    float16.
    """
    path = epath.Path(path)
    size = path.stat().length
    with path.open("rb") as file:
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > size - 8 or length > _MAX_HEADER_BYTES:
            raise UserError(
                f"{path} is not a whole safetensors file ({size} bytes): {recovery_hint(prefix + file.read(32))}"
            )
        raw = file.read(length)
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique)
        if not isinstance(header, dict):
            raise ValueError("it is not a JSON object")
        header.pop("__metadata__", None)
        tensors, end = {}, 0
        for start, stop, name in sorted((*_offsets(name, entry), name) for name, entry in header.items()):
            if start != end or stop < start:
                raise ValueError(f"tensor {brief(name)} overlaps the one before it, or leaves a gap")
            end = stop
            if not layout.IGNORED.search(name):
                shape, dtype = tuple(header[name]["shape"]), _read_dtype(name, header[name], path)
                tensors[name] = StoredTensor(
                    name=name, path=path, dtype=dtype, shape=shape, offset=8 + length + start
                )
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} has a damaged safetensors header: {error}") from error
    if end != size - 8 - length:
        raise UserError(
            f"{path} is not a whole safetensors file: it lists {end} bytes of tensors and has {size - 8 - length};"
            " copy or download it again"
        )
    return tensors


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, whose keys must differ."""
    if len(keys := dict(pairs)) < len(pairs):
        raise ValueError("a name comes twice")
    return keys


def _offsets(name: str, entry: Any) -> tuple[int, int]:
    """The first and last byte of an entry whose types are checked."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"tensor {brief(name)} needs exactly dtype, shape and data_offsets")
    for key in ("shape", "data_offsets"):
        values = entry[key]
        if not isinstance(values, list) or not all(type(value) is int and value >= 0 for value in values):
            raise ValueError(f"tensor {brief(name)} has the {key} {brief(values)}")
    if len(entry["data_offsets"]) != 2:
        raise ValueError(f"tensor {brief(name)} has the data_offsets {brief(entry['data_offsets'])}")
    return tuple(entry["data_offsets"])


def _read_dtype(name: str, entry: Mapping[str, Any], path: epath.Path) -> np.dtype:
    """The dtype of an entry, whose size must agree with its shape."""
    code, shape, (start, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(code, str) or code not in _DTYPES:
        raise UserError(
            f"{path}: tensor {brief(name)} has dtype {brief(code)}; only {', '.join(_DTYPES)} can be imported: use"
            " the original, unquantized model"
        )
    expected = math.prod(shape) * _DTYPES[code].itemsize
    if stop - start != expected:
        raise ValueError(f"tensor {brief(name)} has {brief(stop - start)} bytes, not {brief(expected)}")
    return _DTYPES[code]


def plan_shards(sizes: Mapping[str, int], max_bytes: float) -> dict[str, list[str]]:
    """File -> names of tensors, of together at most `max_bytes`; a larger tensor gets its own file."""
    groups: list[list[str]] = [[]]
    used = 0
    for name, size in sizes.items():
        if groups[-1] and used + size > max_bytes:
            groups.append([])
            used = 0
        groups[-1].append(name)
        used += size
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    suffix = f"-of-{len(groups):05d}.safetensors"
    return {f"model-{index:05d}{suffix}": names for index, names in enumerate(groups, start=1)}


def write_weights(
    directory: epath.Path,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: str,
    tensors: Iterator[tuple[str, np.ndarray]],
    max_shard_bytes: float,
) -> None:
    """Writes safetensors files of at most `max_shard_bytes`, and their index if there are several.

    `tensors` come in the order of `shapes`, C-contiguous and of `dtype`; one is held at a time, a larger one gets its
    own file.
    """
    itemsize = DTYPES[dtype][0].itemsize
    sizes = {name: math.prod(shape) * itemsize for name, shape in shapes.items()}
    shards = plan_shards(sizes, max_shard_bytes)
    for file, names in shards.items():
        _write_shard(directory / file, {name: shapes[name] for name in names}, dtype, tensors)
    assert next(tensors, None) is None  # runs what the iterator checks at its end
    if len(shards) > 1:
        weight_map = {name: file for file, names in shards.items() for name in names}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        write_json(directory / INDEX, index)


def _write_shard(
    path: epath.Path,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: str,
    tensors: Iterator[tuple[str, np.ndarray]],
) -> None:
    numpy_dtype, code = DTYPES[dtype]
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape) * numpy_dtype.itemsize
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [start, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # readers map the tensors: keep them aligned
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little"))
        file.write(encoded)
        for name, shape in shapes.items():
            written, tensor = next(tensors)
            assert (written, tensor.shape, tensor.dtype) == (name, shape, numpy_dtype)
            file.write(memoryview(tensor.reshape(-1).view(np.uint8)))  # NumPy has no buffer of bfloat16
