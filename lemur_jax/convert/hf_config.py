"""`DecoderConfig` to and from Hugging Face's `config.json`."""

import json
import math
from collections.abc import Mapping
from typing import Any

from etils import epath

from lemur_jax.common.errors import UserError
from lemur_jax.models.config import DecoderConfig

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
    """The JSON object in a file; UserError if it cannot be read or is another value."""
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


def read_config(hf_dir: epath.PathLike) -> DecoderConfig:
    """The model's shape from a Hugging Face directory; UserError without one, or as in `from_hf`."""
    path = epath.Path(hf_dir) / "config.json"
    if not path.parent.exists():  # `is_dir` would say no of a store that cannot be reached
        raise UserError(f"{path.parent} is not a directory: download the model there first")
    return from_hf(read_json(path), str(path))


def from_hf(raw: Mapping[str, Any], where: str = "config.json") -> DecoderConfig:
    """`config.json` of transformers 4 or 5 as ours; UserError for what our model would compute differently."""
    _refuse_foreign(raw, where)
    fields: dict[str, Any] = {}
    for key in _REQUIRED:
        if raw.get(key) is None:
            raise UserError(f"{where}: {key} is missing")
        fields[key] = _number(raw[key], int, key, where)
    heads, width = fields["num_attention_heads"], fields["hidden_size"]
    if raw.get("head_dim") is None and width % heads:
        raise UserError(f"{where}: hidden_size {width} is not a multiple of num_attention_heads {heads}")
    defaults = {"num_key_value_heads": heads, "head_dim": width // heads, **_DEFAULTS[raw["model_type"]]}
    for key, default in defaults.items():  # a 0 or "" is refused and not replaced
        fields[key] = _number(default if raw.get(key) is None else raw[key], type(default), key, where)
    fields["tie_word_embeddings"] = raw.get("tie_word_embeddings", False)
    fields.update(_rope_from_hf(raw, fields["max_position_embeddings"], where))
    try:
        return DecoderConfig(**fields)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def _refuse_foreign(raw: Mapping[str, Any], where: str) -> None:
    """Raises for anything that makes the model another than our Llama."""
    model_type, layers = raw.get("model_type"), raw.get("layer_types") or []
    # Mistral's window is 4096 where its config does not say.
    window = raw.get("sliding_window", 4096 if model_type == "mistral" else None)
    full = isinstance(layers, list) and set(map(str, layers)) <= {"full_attention"}
    for key, accepted, reason in (
        ("model_type", model_type in list(_DEFAULTS), f"only {' and '.join(_DEFAULTS)} can be imported"),
        ("sliding_window", window is None, "only full attention is implemented (null)"),
        ("layer_types", full, "only a list of full_attention is implemented"),
        ("attention_bias", not raw.get("attention_bias"), "projections with a bias are not implemented"),
        ("mlp_bias", not raw.get("mlp_bias"), "projections with a bias are not implemented"),
        ("quantization_config", not raw.get("quantization_config"), "import the original, unquantized"),
        ("hidden_act", raw.get("hidden_act", "silu") in ("silu", "swish"), "only silu is implemented"),
        ("tie_word_embeddings", type(raw.get("tie_word_embeddings", False)) is bool, "use true or false"),
    ):
        if not accepted:
            value = window if key == "sliding_window" else raw.get(key)
            raise UserError(f"{where}: {key} is {value!r:.100}; {reason}")


def _number(value: Any, kind: type, key: str, where: str) -> Any:
    """`value` as a positive int or float, refusing strings, booleans and fractions of an int."""
    good = isinstance(value, int | float) and not isinstance(value, bool)
    if not good or not 0 < value < math.inf or (kind is int and value != int(value)):
        raise UserError(
            f"{where}: {key} is {value!r}, not a positive {'integer' if kind is int else 'number'}"
        )
    return kind(value)


def _rope_from_hf(raw: Mapping[str, Any], max_positions: int, where: str) -> dict[str, Any]:
    """The `rope_*` fields from `rope_scaling`, which counts first in transformers too, or `rope_parameters`."""
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
    config: DecoderConfig, *, dtype: str, bos: int | None, eos: int | None, pad: int | None
) -> dict[str, Any]:
    """`config.json` for transformers 4 and 5; a token id of None switches it off."""
    scaling = None
    if config.rope_scaling != "none":
        scaling = {"rope_type": config.rope_scaling}
        scaling.update({key: getattr(config, f"rope_{key}") for key in _ROPE_KEYS[config.rope_scaling]})
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **{name: value for name, value in config.to_dict().items() if not name.startswith("rope_")},
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
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
