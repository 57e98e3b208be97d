"""The weights in a Hugging Face directory: listed and checked before any is read."""

import dataclasses
import logging
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from lemur_jax.common.errors import UserError
from lemur_jax.common.paths import recovery_hint
from lemur_jax.convert import gguf, layout
from lemur_jax.convert.dtypes import DTYPES
from lemur_jax.convert.hf_config import ADAPTER_CONFIG, read_config, read_json
from lemur_jax.convert.safetensors import StoredTensor, brief, read_header
from lemur_jax.models.config import DecoderConfig
from lemur_jax.text.gguf_files import is_gguf

logger = logging.getLogger(__name__)
# A plain file name: no separators, no "..", no drive.
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*")


@dataclasses.dataclass(frozen=True, kw_only=True)
class BinTensor:
    """A tensor of a `.bin` file, mapped by torch."""

    name: str
    path: epath.Path
    dtype: np.dtype
    shape: tuple[int, ...]
    tensor: Any

    def read(self) -> np.ndarray:
        import torch

        # NumPy has no bfloat16 of its own: go through integers of the same width.
        int_dtype = torch.int32 if self.dtype.itemsize == 4 else torch.int16
        return self.tensor.detach().contiguous().view(int_dtype).numpy().view(self.dtype)

    def rows(self, name: str, start: int, stop: int) -> "BinTensor":
        """Some rows of a matrix as a tensor of its own."""
        tensor = self.tensor[start:stop]
        return dataclasses.replace(self, name=name, shape=tuple(tensor.shape), tensor=tensor)


Tensor = StoredTensor | BinTensor | gguf.GgufTensor
# Prefixes of the text part of a multimodal model and what they become, and of the parts that are left out.
_TEXT = {"language_model.": "", "model.language_model.": "model."}
_OTHER_PARTS = re.compile(r"(model\.)?(vision_tower|multi_modal_projector)\.")


def holds_weights(directory: epath.PathLike) -> bool:
    """Whether this is a directory with weights, an adapter's among them, or a GGUF file."""
    files = [*_weight_files(directory), (epath.Path(directory) / ADAPTER_CONFIG,)]
    return is_gguf(directory) or any(path.exists() for pair in files for path in pair)


def _weight_files(directory: epath.PathLike) -> list[tuple[epath.Path, ...]]:
    """(single file, index), in transformers' order."""
    names = [epath.Path(directory) / name for name in ("model.safetensors", "pytorch_model.bin")]
    return [(single, single.with_name(f"{single.name}.index.json")) for single in names]


def open_weights(hf_dir: epath.PathLike) -> dict[str, Tensor]:
    """The tensors of a directory or a GGUF file by name; only the headers are read.

    Looks, as transformers does, for `model.safetensors`, for its sharded form, and then for the same of
    `pytorch_model.bin`, which needs torch. Raises UserError without weights that can be read.
    """
    if is_gguf(hf_dir):
        expected = (name for weight in layout.weights(read_config(hf_dir)) for name in weight.names)
        return dict(gguf.open_weights(hf_dir, expected))
    for single, index in _weight_files(hf_dir):
        read_file: Any = read_header if single.suffix == ".safetensors" else _read_bin
        if single.exists():
            return read_file(single)
        if index.exists():
            return _open_sharded(index, single.suffix, read_file)
    raise UserError(
        f"{hf_dir} holds no weights: neither model.safetensors nor model.safetensors.index.json is there"
    )


def _open_sharded(index: epath.Path, suffix: str, read_file: Any) -> dict[str, Tensor]:
    """The tensors that an index lists."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index} has no weight_map")
    for name, file in weight_map.items():
        if not isinstance(file, str) or not _FILE_NAME.fullmatch(file) or not file.endswith(suffix):
            raise UserError(
                f"{index}: tensor {brief(name)} is said to be in {brief(file)!r}, which is not the name of a"
                f" {suffix} file in this directory"
            )
    tensors: dict[str, Tensor] = {}
    for file in sorted(set(weight_map.values())):
        path = index.parent / file
        if not path.exists():
            raise UserError(f"{path} is missing, but {index.name} lists it: download it again")
        stored = read_file(path)
        listed = {
            name for name, holder in weight_map.items() if holder == file and not layout.IGNORED.search(name)
        }
        if mismatched := sorted(listed ^ stored.keys()):
            verb, no = ("lacks", "") if mismatched[0] in listed else ("holds", "not ")
            raise UserError(
                f"{path} {verb} tensor {brief(mismatched[0])}, which {index.name} does {no}list there"
            )
        tensors.update(stored)
    return tensors


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
    if not beginning.startswith(b"PK\x03\x04"):
        raise UserError(f"{path} holds no weights of PyTorch 1.6 or later: {recovery_hint(beginning)}")
    try:
        state = torch.load(str(path), map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises RuntimeError, UnpicklingError, EOFError, OSError and more
        raise UserError(f"{path} cannot be read as weights: {brief(error)}") from error
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in state.items()
    ):
        raise UserError(f"{path} is not a dictionary of tensors")
    tensors: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if layout.IGNORED.search(name):
            continue
        code = str(tensor.dtype).removeprefix("torch.")
        if code not in DTYPES:
            raise UserError(
                f"{path}: tensor {brief(name)} has dtype {code}; only {', '.join(DTYPES)} can be imported"
            )
        tensors[name] = BinTensor(
            name=name, path=path, dtype=DTYPES[code][0], shape=tuple(tensor.shape), tensor=tensor
        )
    return tensors


def open_checked(config: DecoderConfig, hf_dir: epath.PathLike) -> dict[str, Tensor]:
    """The tensors of this model by their names in `convert/layout.py`; UserError as `open_weights`, `check_weights`."""
    tensors = _text_part(open_weights(hf_dir))
    H, K, N = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    fused = {
        "self_attn.qkv_proj.weight": {
            "self_attn.q_proj": H * N,
            "self_attn.k_proj": K * N,
            "self_attn.v_proj": K * N,
        },
        "mlp.gate_up_proj.weight": dict.fromkeys(("mlp.gate_proj", "mlp.up_proj"), config.intermediate_size),
    }
    for ending, sizes in fused.items():
        for name in [name for name in tensors if name.endswith(ending)]:
            tensor = tensors[name]
            if tensor.shape != (sum(sizes.values()), config.hidden_size):
                continue  # `check_weights` reports it
            del tensors[name]
            start = 0
            for module, rows in sizes.items():
                new_name = name.replace(ending, module + ".weight")
                tensors[new_name] = tensor.rows(new_name, start, start + rows)
                start += rows
    check_weights(config, tensors, hf_dir)
    return tensors


def _text_part(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a language model, of a multimodal one without its other parts."""
    if "embed_tokens.weight" in tensors:  # saved without its head, as embedding models are
        return {name if name == layout.HEAD else f"model.{name}": tensor for name, tensor in tensors.items()}
    prefix = next((each for each in _TEXT if any(name.startswith(each) for name in tensors)), None)
    if prefix is None:
        return tensors
    text = {name: tensor for name, tensor in tensors.items() if not _OTHER_PARTS.match(name)}
    logger.info("%d tensors that are not of the language model are left out", len(tensors) - len(text))
    return {
        name.replace(prefix, _TEXT[prefix], 1) if name.startswith(prefix) else name: tensor
        for name, tensor in text.items()
    }


def check_weights(config: DecoderConfig, tensors: Mapping[str, Tensor], hf_dir: epath.PathLike) -> None:
    """Raises UserError if a tensor is missing, unexpected or of another shape, or a tied head is not its embedding."""
    expected = {name: weight.hf_shape for weight in layout.weights(config) for name in weight.names}
    tied = config.tie_word_embeddings and layout.HEAD in tensors
    shapes = {name: tensor.shape for name, tensor in tensors.items() if not (tied and name == layout.HEAD)}
    check_shapes(expected, shapes, f"{hf_dir}: weight")
    if tied:  # it may store its head too, if it equals the embedding
        embedding, head = tensors[layout.EMBEDDING], tensors[layout.HEAD]
        uint = f"u{head.dtype.itemsize}"
        same = (embedding.shape, embedding.dtype) == (head.shape, head.dtype)
        if not same or not np.array_equal(embedding.read().view(uint), head.read().view(uint)):
            raise UserError(
                f"{head.path}: config.json says tie_word_embeddings, but {layout.HEAD} differs from"
                f" {layout.EMBEDDING}: set tie_word_embeddings to false or remove {layout.HEAD}"
            )


def check_shapes(expected: Mapping[str, Any], found: Mapping[str, Any], what: str) -> None:
    """Checks that the found names and shapes are those of the model; a UserError names the first that is not."""
    for names, problem in (
        ([name for name in expected if name not in found], "is missing"),
        ([name for name in found if name not in expected], "is not part of this model"),
    ):
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            raise UserError(f"{what} {brief(names[0])} {problem}{more}")
    for name, shape in expected.items():
        if tuple(found[name]) != shape:
            raise UserError(f"{what} {name} has shape {list(found[name])}, the model {list(shape)}")
