"""`DecoderConfig` to and from Hugging Face's `config.json`; `convert/families.py` has what differs by family."""

import json
import os
from collections.abc import Mapping
from typing import Any

from etils import epath

from lemur_jax.common.errors import UserError
from lemur_jax.convert import families, gguf
from lemur_jax.convert.families import number
from lemur_jax.models.config import DecoderConfig
from lemur_jax.text.gguf_files import is_gguf

_REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_NUMBERS = "num_key_value_heads", "head_dim", "rms_norm_eps", "max_position_embeddings", "initializer_range"
_LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
# Required keys of the rope dictionary by type, without the type itself and rope_theta; then the optional ones.
_ROPE_KEYS = {
    "none": (),
    "linear": ("factor",),
    "llama3": _LLAMA3,
    "yarn": ("factor", "original_max_position_embeddings"),
    "longrope": ("factor", "original_max_position_embeddings", "short_factor", "long_factor"),
}
_ROPE_OPTIONAL = {"yarn": ("beta_fast", "beta_slow", "attention_factor"), "longrope": ("attention_factor",)}
_ROPE_NAMES = {"default": "none", "su": "longrope"}  # "su" in the first Phi-3


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
    """The model's shape from a Hugging Face directory or a GGUF file; UserError without one, or as in `from_hf`."""
    if is_gguf(hf_dir):
        return from_hf(gguf.read_config(hf_dir), os.fspath(hf_dir))
    path = epath.Path(hf_dir) / "config.json"
    if not path.parent.exists():  # `is_dir` would say no of a store that cannot be reached
        raise UserError(f"{path.parent} is not a directory: download the model there first")
    return from_hf(read_json(path), str(path))


def _text_part(raw: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """The part of a multimodal model's `config.json` that is about text; others as they are."""
    family = families.TEXT_OF.get(str(raw.get("model_type")))
    if family is None:
        return raw
    text = raw.get("text_config")
    if not isinstance(text, dict) or raw.get("quantization_config"):
        raise UserError(f"{where}: a model of type {raw['model_type']} needs an unquantized text_config")
    return {"model_type": family.model_type, **text}


def from_hf(raw: Mapping[str, Any], where: str = "config.json") -> DecoderConfig:
    """`config.json` of transformers 4 or 5 as ours; UserError for what our model would compute differently."""
    raw = _text_part(raw, where)
    _refuse_foreign(raw, where)
    family = families.BY_NAME[raw["model_type"]]
    fields: dict[str, Any] = {}
    for key in _REQUIRED:
        value = raw.get(key, family.defaults.get(key))
        if value is None:
            raise UserError(f"{where}: {key} is missing")
        fields[key] = number(value, int, key, where)
    heads, width = fields["num_attention_heads"], fields["hidden_size"]
    if raw.get("head_dim") is None and width % heads:
        raise UserError(f"{where}: hidden_size {width} is not a multiple of num_attention_heads {heads}")
    defaults = {"num_key_value_heads": heads, "head_dim": width // heads, **family.defaults}
    for key in _NUMBERS:
        default = defaults[key]  # a 0 or "" is refused and not replaced
        fields[key] = number(default if raw.get(key) is None else raw[key], type(default), key, where)
    fields["tie_word_embeddings"] = raw.get("tie_word_embeddings", defaults.get("tie_word_embeddings", False))
    fields.update(families.spec_fields(family, dict(raw), fields["num_hidden_layers"], width, where))
    default_theta = defaults.get("rope_theta", 10_000.0)
    fields.update(_rope_from_hf(raw, fields["max_position_embeddings"], default_theta, where))
    try:
        return DecoderConfig(**fields)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def _refuse_foreign(raw: Mapping[str, Any], where: str) -> None:
    """Raises for a family that is not known and for weights that are not plain."""
    known = list(families.BY_NAME)
    for key, accepted, reason in (
        ("model_type", raw.get("model_type") in known, f"known are {', '.join(known)}"),
        ("quantization_config", not raw.get("quantization_config"), "import the original, unquantized"),
        ("tie_word_embeddings", type(raw.get("tie_word_embeddings", False)) is bool, "use true or false"),
    ):
        if not accepted:
            raise UserError(f"{where}: {key} is {raw.get(key)!r:.100}; {reason}")


def _rope_from_hf(
    raw: Mapping[str, Any], max_positions: int, default_theta: float, where: str
) -> dict[str, Any]:
    """The `rope_*` fields from `rope_scaling`, which counts first in transformers too, or `rope_parameters`."""
    name = "rope_scaling" if raw.get("rope_scaling") else "rope_parameters"
    rope = raw.get(name) or {}
    local = families.BY_NAME[raw["model_type"]].local_theta
    if local and isinstance(rope, dict):  # layers with a window have their own
        rope = rope.get(families.FULL, rope)
    if not isinstance(rope, dict):
        raise UserError(f"{where}: {name} is {rope!r}, not an object")
    kind = rope.get("rope_type", rope.get("type", "default"))
    kind = _ROPE_NAMES.get(kind, kind) if isinstance(kind, str) else kind
    if not isinstance(kind, str) or kind not in _ROPE_KEYS:
        raise UserError(
            f"{where}: {name} has the type {kind!r}; implemented are default, {', '.join(list(_ROPE_KEYS)[1:])}"
        )
    partial = rope.get("partial_rotary_factor", raw.get("partial_rotary_factor", 1.0))
    if partial not in (None, 1, 1.0):
        raise UserError(f"{where}: partial_rotary_factor is {partial}; only whole heads are rotated (1.0)")
    known = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
    if unknown := sorted(set(rope) - known.union(*_ROPE_KEYS.values(), *_ROPE_OPTIONAL.values())):
        raise UserError(f"{where}: {name} has the unknown key {unknown[0]}")
    thetas = (rope.get("rope_theta"), raw.get("rope_theta"), default_theta)
    theta = next(value for value in thetas if value is not None)
    fields: dict[str, Any] = {"rope_theta": number(theta, float, "rope_theta", where), "rope_scaling": kind}
    # Outside of the object it counts first in transformers.
    key = "original_max_position_embeddings"
    rope = {**rope, key: raw.get(key) or rope.get(key, max_positions)}
    if kind == "longrope" and rope.get("factor") is None:
        rope["factor"] = max_positions / number(
            rope["original_max_position_embeddings"], int, f"{name}.original_max_position_embeddings", where
        )
    for key in _ROPE_KEYS[kind]:
        if rope.get(key) is None:
            raise UserError(f"{where}: {name} of type {kind} lacks {key}")
        wanted = int if key == "original_max_position_embeddings" else float
        if key in ("short_factor", "long_factor"):
            factors = rope[key] if isinstance(rope[key], list) else [rope[key]]
            fields[f"rope_{key}"] = tuple(number(each, float, f"{name}.{key}", where) for each in factors)
        else:
            fields[f"rope_{key}"] = number(rope[key], wanted, f"{name}.{key}", where)
    for key in _ROPE_OPTIONAL.get(kind, ()):
        if rope.get(key) is not None:
            fields[f"rope_{key}"] = number(rope[key], float, f"{name}.{key}", where)
    return fields


def to_hf(
    config: DecoderConfig, *, dtype: str, bos: int | None, eos: int | None, pad: int | None
) -> dict[str, Any]:
    """`config.json` for transformers 4 and 5, of the first family that can say all of `config`; UserError if none can.

    A token id of None switches it off.
    """
    ids = {"bos_token_id": bos, "eos_token_id": eos, "pad_token_id": pad}
    for family in families.FAMILIES:
        if family.divisible_width and config.hidden_size % config.num_attention_heads:
            continue
        raw = {
            "architectures": [family.architecture],
            "model_type": family.model_type,
            **{name: getattr(config, name) for name in (*_REQUIRED, *_NUMBERS, "tie_word_embeddings")},
            **families.config_keys(family, config, _rope_to_hf(config)),
            "attention_dropout": 0.0,
            **ids,
            "use_cache": True,
            "dtype": dtype,
            "torch_dtype": dtype,  # the same for transformers 4
        }
        try:
            if from_hf(raw) == config:
                return raw
        except UserError:
            continue  # this family cannot
    raise UserError(f"no model of transformers ({', '.join(families.BY_NAME)}) computes what this model does")


def _rope_to_hf(config: DecoderConfig) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling`: transformers 5 moves them into `rope_parameters`; 4 knows only them."""
    kind, scaling = config.rope_scaling, None
    if kind != "none":
        scaling = {"rope_type": kind} | {key: getattr(config, f"rope_{key}") for key in _ROPE_KEYS[kind]}
        scaling = {key: list(value) if isinstance(value, tuple) else value for key, value in scaling.items()}
        for key in _ROPE_OPTIONAL.get(kind, ()):
            scaling[key] = getattr(config, f"rope_{key}") or None
    rope = {"rope_theta": config.rope_theta, "rope_scaling": scaling}
    if kind == "longrope":  # where Phi-3 and transformers 4 look for it
        rope["original_max_position_embeddings"] = config.rope_original_max_position_embeddings
    return rope
