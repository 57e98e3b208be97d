"""`DecoderConfig` to and from Hugging Face's `config.json`; `convert/families.py` has what differs by family."""

import copy
import json
import os
from collections.abc import Mapping
from typing import Any

from etils import epath

from lemur_jax.common.errors import UserError, reason_of
from lemur_jax.convert import families, gguf
from lemur_jax.convert.families import number
from lemur_jax.models.config import DecoderConfig
from lemur_jax.text.gguf_files import is_gguf

ADAPTER_CONFIG = "adapter_config.json"
_REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_INTEGERS = "num_key_value_heads", "head_dim", "max_position_embeddings"
_FLOATS = "rms_norm_eps", "initializer_range"
_LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
# Required keys of the rope dictionary by type, without the type itself and rope_theta; then the optional ones.
_ROPE_KEYS = {
    "default": (),
    "linear": ("factor",),
    "llama3": _LLAMA3,
    "yarn": ("factor", "original_max_position_embeddings"),
    "longrope": ("factor", "original_max_position_embeddings", "short_factor", "long_factor"),
}
_ROPE_OPTIONAL = {"yarn": ("beta_fast", "beta_slow", "attention_factor"), "longrope": ("attention_factor",)}


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
    if path.with_name(ADAPTER_CONFIG).exists():
        raise UserError(
            f"{hf_dir} holds a PEFT adapter ({ADAPTER_CONFIG}): train from it with its base as config.init.checkpoint"
            " and this directory as config.adapter.checkpoint, or merge it with peft and name the result"
        )
    return from_hf(read_json(path), str(path))


def _resolve_config(raw: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A `config.json` as transformers completes it; of a multimodal model only the text part.

    Its classes know the defaults of each family and resolve the spellings of earlier versions.
    """
    from transformers import CONFIG_MAPPING

    kind = str(raw.get("model_type"))
    if kind not in {*families.BY_NAME, *families.TEXT_OF}:
        supported = ", ".join(families.BY_NAME)
        raise UserError(f"{where}: model_type is {raw.get('model_type')!r:.100}; known are {supported}")
    text = raw if kind in families.BY_NAME else raw.get("text_config")
    if not isinstance(text, dict):
        raise UserError(f"{where}: a model of type {kind} needs a text_config")
    for key, reason in (
        ("quantization_config", "import the original, unquantized"),
        ("per_layer_config", "all layers must have the same sizes"),
    ):
        if value := raw.get(key) or text.get(key):
            raise UserError(f"{where}: {key} is {value!r:.100}; {reason}")
    # transformers would fill in a missing size with that of some model, and fails on a wrong one in many ways.
    for key in _REQUIRED:
        if text is raw and raw.get(key) is None:
            raise UserError(f"{where}: {key} is missing")
        number(text.get(key, 1), int, key, where)
    if text.get("num_hidden_layers", 1) > families.MAX_LAYERS:
        raise UserError(
            f"{where}: num_hidden_layers is {text['num_hidden_layers']}; at most {families.MAX_LAYERS} are possible"
        )
    raw = copy.deepcopy(dict(raw))
    scaling = raw.get("rope_scaling")
    if isinstance(scaling, dict) and scaling.get("type") == "su":  # the first Phi-3's name for it
        scaling["type"] = "longrope"
    try:
        config = CONFIG_MAPPING[kind].from_dict(raw).get_text_config()
        config.standardize_rope_params()  # as its models do, which then find keys outside of `rope_scaling`
    except Exception as error:  # each class has checks of its own
        raise UserError(f"{where}: transformers refuses it: {reason_of(error)}") from error
    return config.to_dict()


def from_hf(raw: Mapping[str, Any], where: str = "config.json") -> DecoderConfig:
    """`config.json` of transformers 4 or 5 as ours; UserError for what our model would compute differently."""
    raw = _resolve_config(raw, where)
    family = families.BY_NAME[raw["model_type"]]
    if raw.get("head_dim") is None:
        raw["head_dim"] = raw["hidden_size"] // raw["num_attention_heads"]
    fields = {key: number(raw[key], int, key, where) for key in (*_REQUIRED, *_INTEGERS)}
    fields |= {key: number(raw[key], float, key, where) for key in _FLOATS}
    fields["tie_word_embeddings"] = raw["tie_word_embeddings"]
    fields |= families.spec_fields(family, raw, where)
    rope = raw["rope_parameters"]
    if family.local_theta:  # by kind of layer; transformers ignores keys beside them
        if extra := sorted(rope.keys() - {families.FULL, families.SLIDING}):
            raise UserError(f"{where}: rope_parameters has {extra[0]} outside of {families.FULL}")
        rope = rope[families.FULL]
    fields |= _rope_from_hf(rope, fields["max_position_embeddings"], where)
    try:
        return DecoderConfig(**fields)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def _rope_from_hf(rope: Mapping[str, Any], max_positions: int, where: str) -> dict[str, Any]:
    """The `rope_*` fields from `rope_parameters` of transformers 5."""
    kind = str(rope.get("rope_type", "default"))
    if str(rope.get("type", kind)) != kind:
        raise UserError(
            f"{where}: the rotary embedding has the rope_type {kind!r} and the type {rope['type']!r}"
        )
    if kind not in _ROPE_KEYS:
        implemented = ", ".join(_ROPE_KEYS)
        raise UserError(f"{where}: the rotary embedding has the type {kind!r}; implemented are {implemented}")
    if rope.get("partial_rotary_factor") not in (None, 1):
        raise UserError(
            f"{where}: partial_rotary_factor is {rope['partial_rotary_factor']}; only whole heads are rotated (1.0)"
        )
    # `finetuned` is in the configs of the first models with YaRN, and nothing reads it.
    allowed = {"rope_type", "type", "rope_theta", "partial_rotary_factor", "finetuned"}
    if unknown := sorted(set(rope) - allowed.union(*_ROPE_KEYS.values(), *_ROPE_OPTIONAL.values())):
        raise UserError(f"{where}: rope_parameters has the unknown key {unknown[0]}")
    if kind == "longrope" and rope.get("factor") is None:
        key = "original_max_position_embeddings"
        rope = {**rope, "factor": max_positions / number(rope.get(key), int, key, where)}
    fields: dict[str, Any] = {
        "rope_theta": number(rope["rope_theta"], float, "rope_theta", where),
        "rope_scaling": "none" if kind == "default" else kind,
    }
    for key in (*_ROPE_KEYS[kind], *_ROPE_OPTIONAL.get(kind, ())):
        value = rope.get(key)
        if value is None and key in _ROPE_KEYS[kind]:
            raise UserError(f"{where}: the rotary embedding of type {kind} lacks {key}")
        if isinstance(value, list):
            fields[f"rope_{key}"] = tuple(number(item, float, key, where) for item in value)
        elif value is not None:
            number_type = int if key == "original_max_position_embeddings" else float
            fields[f"rope_{key}"] = number(value, number_type, key, where)
    return fields


def to_hf(
    config: DecoderConfig, *, dtype: str, bos: int | None, eos: int | None, pad: int | None
) -> dict[str, Any]:
    """`config.json` for transformers 4 and 5, of the first family that can say all of `config`; UserError if none can.

    A token id of None switches it off.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    ids = {"bos_token_id": bos, "eos_token_id": eos, "pad_token_id": pad}
    for family in families.FAMILIES:
        raw = {
            "architectures": [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family.model_type]],
            "model_type": family.model_type,
            **{
                name: getattr(config, name)
                for name in (*_REQUIRED, *_INTEGERS, *_FLOATS, "tie_word_embeddings")
            },
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
