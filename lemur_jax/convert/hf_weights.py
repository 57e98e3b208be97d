"""The weights in a Hugging Face directory: listed and checked before any is read."""

import re
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import numpy as np
from etils import epath

from lemur_jax.common.errors import UserError
from lemur_jax.common.paths import how_to_mend
from lemur_jax.convert import layout
from lemur_jax.convert.dtypes import DTYPES
from lemur_jax.convert.hf_config import read_json
from lemur_jax.convert.safetensors import brief, read_header
from lemur_jax.models.config import LlamaConfig

# A plain file name: no separators, no "..", no drive.
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*")
# Rows of two tensors that are compared at a time.
_ROWS = 4096


class Tensor(Protocol):
    """A tensor in a file of any format."""

    name: str
    path: epath.Path
    dtype: np.dtype
    shape: tuple[int, ...]

    def read(self) -> np.ndarray: ...


def holds_weights(directory: epath.PathLike) -> bool:
    """Whether the directory has files that `open_weights` opens."""
    return any(path.exists() for files in _weight_files(directory) for path in files[:2])


def _weight_files(directory: epath.PathLike) -> Iterator[tuple[epath.Path, epath.Path, str]]:
    """(single file, index, suffix), in transformers' order."""
    for stem, suffix in (("model", "safetensors"), ("pytorch_model", "bin")):
        name = f"{stem}.{suffix}"
        yield epath.Path(directory) / name, epath.Path(directory) / f"{name}.index.json", suffix


def open_weights(hf_dir: epath.PathLike) -> dict[str, Tensor]:
    """The tensors of a directory by name; only the headers of safetensors are read.

    Looks, as transformers does, for `model.safetensors`, for its sharded form, and then for the same of
    `pytorch_model.bin`, which needs torch and is opened without running code from the file.

    Raises:
      UserError: no weights, a damaged file or index, an unknown dtype, or `.bin` without torch.
    """
    for single, index, suffix in _weight_files(hf_dir):
        read_file = read_header if suffix == "safetensors" else _read_bin
        if single.exists():
            return dict(read_file(single))
        if index.exists():
            return _open_sharded(index, suffix, read_file)
    raise UserError(
        f"{hf_dir} holds no weights: neither model.safetensors nor model.safetensors.index.json is there"
    )


def _open_sharded(index: epath.Path, suffix: str, read_file: Any) -> dict[str, Tensor]:
    """The tensors that an index lists."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index} has no weight_map")
    files = set()
    for name, file in weight_map.items():
        if not isinstance(file, str) or not _FILE_NAME.fullmatch(file) or not file.endswith(f".{suffix}"):
            raise UserError(
                f"{index}: tensor {brief(name)} is said to be in {brief(file)!r}, which is not the name of a"
                f" .{suffix} file in this directory"
            )
        files.add(file)
    tensors: dict[str, Tensor] = {}
    for file in sorted(files):
        path = index.parent / file
        if not path.exists():
            raise UserError(f"{path} is missing, but {index.name} lists it: download it again")
        found = read_file(path)
        listed = {
            name for name, holder in weight_map.items() if holder == file and not layout.IGNORED.search(name)
        }
        if absent := sorted(listed - found.keys()):
            raise UserError(f"{path} lacks tensor {brief(absent[0])}, which {index.name} says is in it")
        if extra := sorted(found.keys() - listed):
            raise UserError(
                f"{path} holds tensor {brief(extra[0])}, which {index.name} does not say is in it"
            )
        tensors.update(found)
    return tensors


class _BinTensor:
    """A tensor of a `.bin` file, mapped by torch where its format allows."""

    def __init__(self, name: str, path: epath.Path, tensor: Any):
        self.name, self.path, self._tensor = name, path, tensor
        self.shape = tuple(tensor.shape)
        code = str(tensor.dtype).removeprefix("torch.")
        if code not in DTYPES:
            raise UserError(
                f"{path}: tensor {brief(name)} has dtype {code}; only {', '.join(DTYPES)} can be imported"
            )
        self.dtype = DTYPES[code][0]

    def read(self) -> np.ndarray:
        import torch

        # NumPy has no bfloat16 of its own: go through integers of the same width.
        bits = torch.int32 if self.dtype.itemsize == 4 else torch.int16
        return self._tensor.detach().contiguous().view(bits).numpy().view(self.dtype)


def _read_bin(path: epath.Path) -> dict[str, Tensor]:
    """The tensors of one `pytorch_model*.bin`, without running any code that is pickled in it."""
    try:
        import torch
    except ImportError:
        raise UserError(
            f"{path.parent} has only PyTorch .bin weights: install torch to read them, or convert them to"
            " safetensors first"
        ) from None
    with path.open("rb") as file:
        beginning = file.read(64)
    # Before 1.6 torch wrote a pickle, which cannot be mapped: all of it is read.
    zipped = beginning.startswith(b"PK\x03\x04")
    if not zipped and not beginning.startswith(b"\x80"):
        raise UserError(f"{path} holds no weights of PyTorch: {how_to_mend(beginning)}")
    try:
        state = torch.load(str(path), map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # torch raises RuntimeError, UnpicklingError, EOFError, OSError and more
        raise UserError(f"{path} cannot be read as weights: {brief(error)}") from error
    if not isinstance(state, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in state.values()):
        raise UserError(f"{path} is not a dictionary of tensors")
    return {
        str(name): _BinTensor(str(name), path, tensor)
        for name, tensor in state.items()
        if not layout.IGNORED.search(str(name))
    }


def check_weights(config: LlamaConfig, tensors: Mapping[str, Tensor], hf_dir: epath.PathLike) -> None:
    """Checks that the tensors are exactly those of the model.

    Raises:
      UserError: a tensor is missing, unexpected or of another shape; or a tied model brings a head
        that is not its embedding.
    """
    if config.num_hidden_layers > len(tensors):  # before that many names are made
        raise UserError(
            f"{hf_dir}: config.json says {config.num_hidden_layers} layers, but only"
            f" {len(tensors)} tensors are there"
        )
    expected = {name: weight.hf_shape for weight in layout.weights(config) for name in weight.names}
    if missing := [name for name in expected if name not in tensors]:
        raise UserError(f"{hf_dir}: weight {missing[0]} is missing{_and_more(missing)}")
    unexpected = [name for name in tensors if name not in expected]
    if config.tie_word_embeddings and layout.HEAD in unexpected:
        unexpected.remove(layout.HEAD)
        _check_tied(tensors)
    if unexpected:
        raise UserError(
            f"{hf_dir}: weight {brief(unexpected[0])} is not part of this Llama{_and_more(unexpected)}"
        )
    for name, shape in expected.items():
        if tensors[name].shape != shape:
            raise UserError(
                f"{tensors[name].path}: weight {name} has shape {list(tensors[name].shape)}, but config.json"
                f" makes it {list(shape)}"
            )


def _and_more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def _check_tied(tensors: Mapping[str, Tensor]) -> None:
    """A tied model may store its head too, if it equals the embedding."""
    embedding, head = tensors[layout.EMBEDDING], tensors[layout.HEAD]
    same = embedding.shape == head.shape and embedding.dtype == head.dtype
    if same:
        left, right = embedding.read(), head.read()
        same = all(
            left[row : row + _ROWS].tobytes() == right[row : row + _ROWS].tobytes()
            for row in range(0, left.shape[0], _ROWS)
        )
    if not same:
        raise UserError(
            f"{head.path}: config.json says tie_word_embeddings, but {layout.HEAD} differs from"
            f" {layout.EMBEDDING}: set tie_word_embeddings to false or remove {layout.HEAD}"
        )
