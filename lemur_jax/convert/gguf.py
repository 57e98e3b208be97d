"""GGUF files as a source of models: configuration and weights, one dequantized tensor at a time."""

import dataclasses
import os
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from etils import epath

from lemur_jax.common.errors import UserError
from lemur_jax.convert.families import number
from lemur_jax.convert.safetensors import brief
from lemur_jax.text.gguf_files import metadata, open_gguf

# Keys of the metadata under the architecture's name, to those of `config.json`.
_KEYS = {
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads",
    "context_length": "max_position_embeddings",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
# Others that are read, or say what the keys above say.
_OTHERS = {"attention.head_count_kv", "attention.key_length", "attention.value_length", "vocab_size"} | {
    *("rope.freq_base", "rope.dimension_count", "rope.scaling.type", "rope.scaling.factor"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Architecture:
    """What is specific to the files of one `general.architecture`."""

    model_type: str  # of transformers
    keys: Mapping[str, str]  # as `_KEYS`
    interleaved: bool  # whether channels 2i and 2i + 1 of a head are rotated together
    norm_offset: float = 0.0  # added to the scales of norms in the file


ARCHITECTURES = {
    "llama": Architecture(model_type="llama", keys=_KEYS, interleaved=True),
    "gemma3": Architecture(
        model_type="gemma3_text",
        keys={**_KEYS, "attention.sliding_window": "sliding_window"},
        interleaved=False,
        norm_offset=1.0,
    ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class GgufTensor:
    """A tensor of a GGUF file that is not read yet; `dtype` is what `read` gives."""

    name: str
    path: epath.Path
    shape: tuple[int, ...]
    heads: int  # > 0: rows of these heads are in llama.cpp's order
    offset: float  # added to the values in the file
    quantization: Any
    data: np.ndarray  # mapped; a row is one of the tensor's
    dtype: np.dtype = dataclasses.field(default_factory=lambda: np.dtype(np.float32))

    def read(self) -> np.ndarray:
        """The tensor in float32."""
        import gguf

        data = gguf.quants.dequantize(self.data, self.quantization).reshape(self.shape)
        if not self.heads:
            return data - np.float32(self.offset) if self.offset else data
        # llama.cpp rotates channels 2i and 2i + 1 of a head, this model and transformers i and i + N/2.
        halves = data.reshape(self.heads, -1, 2, self.shape[1])
        return halves.swapaxes(1, 2).reshape(self.shape)

    def rows(self, name: str, start: int, stop: int) -> "GgufTensor":
        """Some rows of a matrix, in the order of the file, as a tensor of its own."""
        shape, data = (stop - start, self.shape[1]), self.data[start:stop]
        return dataclasses.replace(self, name=name, shape=shape, heads=0, data=data)


def read_config(path: epath.PathLike) -> dict[str, Any]:
    """The `config.json` that the metadata of a GGUF file says; UserError for what is not implemented."""
    kind, architecture = _architecture(path)
    # Numbers are float32 in the file: 1e-5 is there as 9.999999747378752e-06.
    data = {
        key: float(str(np.float32(value))) if isinstance(value, float) else value
        for key, value in metadata(path, f"{kind}.").items()
    }
    for key in architecture.keys:
        if key not in data:
            raise UserError(f"{path}: {kind}.{key} is missing")
    if unknown := sorted(data.keys() - architecture.keys.keys() - _OTHERS):
        key = unknown[0]
        raise UserError(f"{path}: {kind}.{key} is {data[key]!r:.80}, which is not implemented")
    heads, width = (
        number(data[key], int, f"{kind}.{key}", os.fspath(path))
        for key in ("attention.head_count", "embedding_length")
    )
    shapes = {tensor.name: tensor.shape for tensor in open_gguf(path).tensors}
    if "token_embd.weight" not in shapes:
        raise UserError(f"{path}: token_embd.weight is missing")
    head_dim = data.get("attention.key_length", width // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if data.get(key, head_dim) != head_dim:
            raise UserError(
                f"{path}: {kind}.{key} is {data[key]}; only whole heads of {head_dim} are implemented"
            )
    if "rope_freqs.weight" in shapes:
        raise UserError(
            f"{path}: rope_freqs.weight scales the rotary frequencies (Llama 3.1), and does not say by which rule:"
            " import the model's Hugging Face directory instead"
        )
    # As llama.cpp reads it: a factor without a type is linear.
    scaling = data.get("rope.scaling.type", "linear" if "rope.scaling.factor" in data else "none")
    if scaling not in ("none", "linear"):
        raise UserError(
            f"{path}: {kind}.rope.scaling.type is {scaling!r}; only none and linear are implemented"
        )
    linear = {"rope_type": "linear", "factor": data.get("rope.scaling.factor")}
    return {
        "model_type": architecture.model_type,
        **{name: data[key] for key, name in architecture.keys.items()},
        "vocab_size": int(shapes["token_embd.weight"][1]),
        "num_key_value_heads": data.get("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "tie_word_embeddings": "output.weight" not in shapes,
        "rope_theta": data.get("rope.freq_base", 10_000.0),
        "rope_scaling": linear if scaling == "linear" else None,
        # Read for Gemma alone; as llama.cpp has it, which tells the 27B model by its narrower heads.
        "query_pre_attn_scalar": 256 if head_dim == 256 else width // heads,
    }


def _architecture(path: epath.PathLike) -> tuple[str, Architecture]:
    """`general.architecture`, and what follows from it."""
    kind = metadata(path, "general.").get("architecture")
    if kind not in ARCHITECTURES:
        names = " and ".join(ARCHITECTURES)
        raise UserError(f"{path}: general.architecture is {kind!r}; only {names} can be imported")
    return kind, ARCHITECTURES[kind]


def open_weights(path: epath.PathLike, expected: Iterable[str]) -> dict[str, GgufTensor]:
    """The tensors of a GGUF file by Hugging Face names, those of `expected` that llama.cpp has a name for.

    Raises UserError: a quantization that `gguf` cannot undo.
    """
    import gguf

    config, (kind, architecture) = read_config(path), _architecture(path)
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH[kind.upper()], config["num_hidden_layers"])
    names = {table.get_name(name, (".weight",)): name for name in expected}
    heads = {}
    if architecture.interleaved:
        heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    tensors = {}
    for tensor in open_gguf(path).tensors:
        try:
            gguf.quants.dequantize(tensor.data[:1], tensor.tensor_type)
        except NotImplementedError as error:
            raise UserError(f"{path}: tensor {brief(tensor.name)}: {error} in the library gguf") from error
        name = names.get(tensor.name, tensor.name)
        tensors[name] = GgufTensor(
            name=brief(name),
            path=epath.Path(os.fspath(path)),
            shape=tuple(int(size) for size in reversed(tensor.shape)),
            heads=heads.get(tensor.name.removesuffix(".weight").rpartition(".")[2], 0),
            offset=architecture.norm_offset if name.endswith("norm.weight") else 0.0,
            quantization=tensor.tensor_type,
            data=tensor.data,
        )
    return tensors
