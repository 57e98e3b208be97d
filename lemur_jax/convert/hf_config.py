"""`LlamaConfig` to and from Hugging Face's `config.json`."""

import json
import math
from collections.abc import Mapping
from typing import Any

from etils import epath

from lemur_jax.common.errors import UserError
from lemur_jax.models.config import LlamaConfig

_REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
# What transformers takes where config.json says nothing.
_DEFAULTS = {
    "llama": {"rms_norm_eps": 1e-6, "max_position_embeddings": 2048, "initializer_range": 0.02},
    "mistral": {"rms_norm_eps": 1e-6, "max_position_embeddings": 131_072, "initializer_range": 0.02},
}
_LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
# Keys of the rope dictionary that each type may carry, besides the type itself and rope_theta.
_ROPE_KEYS = {"none": (), "linear": ("factor",), "llama3": _LLAMA3}


def read_json(path: epath.Path) -> dict[str, Any]:
    """A JSON object in a file.

    Raises:
      UserError: no such file, one that cannot be read, or not a JSON object.
    """
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: is {path.parent} a Hugging Face model directory?") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} is not a JSON object")
    return value


def read_config(hf_dir: epath.PathLike) -> LlamaConfig:
    """The model's shape from a Hugging Face directory.

    Raises:
      UserError: there is no such directory or no `config.json` in it, or as in `from_hf`.
    """
    path = epath.Path(hf_dir) / "config.json"
    if not path.parent.exists():  # `is_dir` would say no of a store that cannot be reached
        raise UserError(f"{path.parent} is not a directory: download the model there first")
    return from_hf(read_json(path), str(path))


def from_hf(raw: Mapping[str, Any], where: str = "config.json") -> LlamaConfig:
    """Hugging Face's config as ours; anything that our model would compute differently is refused by name.

    Args:
      raw: the content of `config.json`, as transformers 4 or 5 writes it.
      where: the file, for messages.

    Raises:
      UserError: another architecture, biases, a sliding window, quantized weights, an unknown rotary
        scaling, or a field that is missing or of the wrong type.
    """
    _refuse_foreign(raw, where)
    fields: dict[str, Any] = {}
    for key in _REQUIRED:
        if raw.get(key) is None:
            raise UserError(f"{where}: {key} is missing")
        fields[key] = _number(raw[key], int, key, where)
    heads = fields["num_attention_heads"]
    fields["num_key_value_heads"] = _number(
        _given(raw, "num_key_value_heads", heads), int, "num_key_value_heads", where
    )
    if raw.get("head_dim") is None and fields["hidden_size"] % heads:
        raise UserError(
            f"{where}: hidden_size {fields['hidden_size']} is not a multiple of num_attention_heads {heads}"
        )
    head_dim = _given(raw, "head_dim", fields["hidden_size"] // heads)
    fields["head_dim"] = _number(head_dim, int, "head_dim", where)
    for key, default in _DEFAULTS[raw["model_type"]].items():
        fields[key] = _number(_given(raw, key, default), type(default), key, where)
    tied = raw.get("tie_word_embeddings", False)
    if not isinstance(tied, bool):
        raise UserError(f"{where}: tie_word_embeddings is {tied!r}, not true or false")
    fields["tie_word_embeddings"] = tied
    fields.update(_rope_from_hf(raw, fields["max_position_embeddings"], where))
    try:
        return LlamaConfig(**fields)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def _refuse_foreign(raw: Mapping[str, Any], where: str) -> None:
    """Raises for anything that makes the model another than our Llama."""
    model_type = raw.get("model_type")
    if not isinstance(model_type, str) or model_type not in _DEFAULTS:
        raise UserError(
            f"{where}: model_type is {model_type!r}; only {' and '.join(_DEFAULTS)} can be imported"
        )
    # Mistral's window is 4096 where its config does not say.
    window = raw.get("sliding_window", 4096 if model_type == "mistral" else None)
    if window is not None:
        raise UserError(f"{where}: sliding_window is {window}; only full attention is implemented (null)")
    layers = raw.get("layer_types") or []
    if not isinstance(layers, list):
        raise UserError(f"{where}: layer_types is {layers!r}, not a list")
    if set(map(str, layers)) - {"full_attention"}:
        raise UserError(
            f"{where}: layer_types has other kinds than full_attention, which are not implemented"
        )
    for key in ("attention_bias", "mlp_bias"):
        if raw.get(key):
            raise UserError(f"{where}: {key} is true; projections with a bias are not implemented")
    if raw.get("quantization_config"):
        method = raw["quantization_config"]
        method = method.get("quant_method", "unknown") if isinstance(method, dict) else method
        raise UserError(
            f"{where}: quantization_config says the weights are quantized ({method}); import the original"
        )
    if raw.get("hidden_act", "silu") not in ("silu", "swish"):
        raise UserError(f"{where}: hidden_act is {raw['hidden_act']!r}; only silu is implemented")


def _given(raw: Mapping[str, Any], key: str, default: Any) -> Any:
    """The value of a key; the default where it is missing or null, but not where it is 0 or ""."""
    return default if raw.get(key) is None else raw[key]


def _number(value: Any, kind: type, key: str, where: str) -> Any:
    """`value` as a positive int or float, refusing strings, booleans and fractions of an int."""
    good = isinstance(value, int | float) and not isinstance(value, bool)
    if not good or not 0 < value < math.inf or (kind is int and value != int(value)):
        raise UserError(
            f"{where}: {key} is {value!r}, not a positive {'integer' if kind is int else 'number'}"
        )
    return kind(value)


def _rope_from_hf(raw: Mapping[str, Any], max_positions: int, where: str) -> dict[str, Any]:
    """The `rope_*` fields from `rope_scaling` and `rope_theta`, or from `rope_parameters`.

    If both are given `rope_scaling` counts, as in transformers.
    """
    name = "rope_scaling" if raw.get("rope_scaling") else "rope_parameters"
    rope = raw.get(name) or {}
    if not isinstance(rope, dict):
        raise UserError(f"{where}: {name} is {rope!r}, not an object")
    kind = rope.get("rope_type", rope.get("type", "default"))
    kind = "none" if kind == "default" else kind
    if not isinstance(kind, str) or kind not in _ROPE_KEYS:
        raise UserError(
            f"{where}: {name} has the type {kind!r}; only default, linear and llama3 are implemented"
        )
    partial = rope.get("partial_rotary_factor", raw.get("partial_rotary_factor", 1.0))
    if partial not in (None, 1, 1.0):
        raise UserError(f"{where}: partial_rotary_factor is {partial}; only whole heads are rotated (1.0)")
    known = {"rope_type", "type", "rope_theta", "partial_rotary_factor", *_LLAMA3}
    if unknown := sorted(set(rope) - known):
        raise UserError(f"{where}: {name} has the unknown key {unknown[0]}")
    thetas = (rope.get("rope_theta"), raw.get("rope_theta"), 10_000.0)
    theta = next(value for value in thetas if value is not None)
    fields: dict[str, Any] = {"rope_theta": _number(theta, float, "rope_theta", where), "rope_scaling": kind}
    for key in _ROPE_KEYS[kind]:
        value = rope.get(key, max_positions if key == "original_max_position_embeddings" else None)
        if value is None:
            raise UserError(f"{where}: {name} of type {kind} lacks {key}")
        number = int if key == "original_max_position_embeddings" else float
        fields[f"rope_{key}"] = _number(value, number, f"{name}.{key}", where)
    return fields


def to_hf(
    config: LlamaConfig, *, dtype: str, bos: int | None, eos: int | None, pad: int | None
) -> dict[str, Any]:
    """`config.json` for transformers 4 and 5.

    Args:
      config: the model.
      dtype: of the written weights, e.g. "bfloat16".
      bos, eos, pad: token ids; None: null, which switches them off.
    """
    scaling = None
    if config.rope_scaling != "none":
        scaling = {"rope_type": config.rope_scaling}
        scaling.update({key: getattr(config, f"rope_{key}") for key in _ROPE_KEYS[config.rope_scaling]})
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.rms_norm_eps,
        "max_position_embeddings": config.max_position_embeddings,
        "tie_word_embeddings": config.tie_word_embeddings,
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": config.initializer_range,
        # transformers 5 moves these two into `rope_parameters`; 4 knows only them.
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling,
        "bos_token_id": bos,
        "eos_token_id": eos,
        "pad_token_id": pad,
        "use_cache": True,
        "dtype": dtype,
        "torch_dtype": dtype,  # the same for transformers 4
    }
