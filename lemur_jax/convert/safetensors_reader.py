"""Reads safetensors files: validated header first, then one tensor at a time.

The `safetensors` library has no bfloat16 for NumPy and reads local files only, so the format is read
here: 8 bytes little-endian header length, a JSON header, then the tensors' bytes without gaps
(https://huggingface.co/docs/safetensors). A file is trusted in nothing: no number in it leads to an
allocation before it agrees with the file's size, and no name in it is ever used as a path.
"""

import dataclasses
import json
import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from etils import epath

from lemur_jax.common.errors import UserError
from lemur_jax.common.paths import how_to_mend, is_object_store
from lemur_jax.convert.dtypes import DTYPES

# The format's own limit.
MAX_HEADER_BYTES = 100_000_000
MAX_RANK = 8
# An object store gives one stream a fraction of what it gives several.
_PIECE_BYTES = 16 << 20
_STREAMS = 16
_DTYPES = {code: dtype for dtype, code in DTYPES.values()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """A tensor in a file, not read yet.

    Attributes:
      name: its name.
      path: the file that holds it.
      dtype: NumPy dtype.
      shape: its shape.
      offset: its first byte in the file.
    """

    name: str
    path: epath.Path
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int

    def read(self) -> np.ndarray:
        """The tensor, read-only.

        A local file is mapped anew at each call, so that its pages leave memory with the array; a
        remote one is read in several streams at once.

        Raises:
          UserError: the file has become shorter meanwhile.
        """
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


def brief(name: object) -> str:
    """A name out of a file, fit for one line of a message."""
    text = str(name)
    text = text if len(text) <= 120 else text[:117] + "..."
    return "".join(char if char.isprintable() else "?" for char in text)


def read_header(path: epath.PathLike) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file.

    Raises:
      UserError: the file is not whole, its header is not as the format says, or a tensor is not
        float32, bfloat16 or float16.
    """
    path = epath.Path(path)
    size = path.stat().length
    with path.open("rb") as file:
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > size - 8 or length > MAX_HEADER_BYTES:
            raise UserError(
                f"{path} is not a whole safetensors file ({size} bytes): {how_to_mend(prefix + file.read(32))}"
            )
        raw = file.read(length)
    entries = _parse(path, raw)
    data_start, data_bytes = 8 + length, size - 8 - length
    tensors, spans = {}, []
    for name, entry in entries.items():
        dtype, shape, (start, stop) = _check_entry(path, name, entry)
        spans.append((start, stop, name))
        tensors[name] = StoredTensor(
            name=name, path=path, dtype=dtype, shape=shape, offset=data_start + start
        )
    _check_spans(path, sorted(spans), data_bytes)
    return tensors


def _parse(path: epath.Path, raw: bytes) -> dict[str, Any]:
    """The header's JSON object without `__metadata__`, refusing a name that comes twice."""

    def unique(pairs):
        keys = {}
        for key, value in pairs:
            if key in keys:
                raise ValueError(f"name {brief(key)} comes twice")
            keys[key] = value
        return keys

    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} has a damaged safetensors header: {brief(error)}") from error
    if not isinstance(header, dict):
        raise UserError(f"{path} has a damaged safetensors header: not a JSON object")
    header.pop("__metadata__", None)
    return header


def _check_entry(path: epath.Path, name: str, entry: Any) -> tuple[np.dtype, tuple[int, ...], list[int]]:
    """(dtype, shape, byte range) of one header entry."""

    def damaged(what: str) -> UserError:
        return UserError(f"{path} has a damaged safetensors header: tensor {brief(name)} {what}")

    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise damaged("needs exactly dtype, shape and data_offsets")
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not _naturals(shape) or len(shape) > MAX_RANK:
        raise damaged(f"has the shape {brief(shape)}")
    if not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise damaged(f"has the data_offsets {brief(offsets)}")
    if not isinstance(code, str) or code not in _DTYPES:
        raise UserError(
            f"{path}: tensor {brief(name)} has dtype {brief(code)}; only {', '.join(_DTYPES)} can be imported"
        )
    expected = math.prod(shape) * _DTYPES[code].itemsize
    if offsets[1] - offsets[0] != expected:
        raise damaged(
            f"of {code} {brief(shape)} has {brief(offsets[1] - offsets[0])} bytes, not {brief(expected)}"
        )
    return _DTYPES[code], tuple(shape), offsets


def _naturals(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def _check_spans(path: epath.Path, spans: list[tuple[int, int, str]], data_bytes: int) -> None:
    """The format has no gaps, no overlaps and no bytes left over."""
    end = 0
    for start, stop, name in spans:
        if start != end:
            what = "overlaps the tensor before it" if start < end else "leaves a gap before it"
            raise UserError(f"{path} has a damaged safetensors header: tensor {brief(name)} {what}")
        end = stop
    if end != data_bytes:
        raise UserError(
            f"{path} is not a whole safetensors file: the header wants {brief(end)} bytes of tensors,"
            f" the file has {data_bytes}; copy or download it again"
        )
