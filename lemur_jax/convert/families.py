"""The families of models that can be imported and exported: what each `config.json` has beyond Llama's keys.

A family translates to and from `DecoderConfig`; no other module knows a family's name. Names of tensors follow from the
specification alone (`convert/layout.py`).
"""

import dataclasses
import sys
from collections.abc import Mapping
from typing import Any

from lemur_jax.common.errors import UserError
from lemur_jax.models.config import DecoderConfig

Raw = dict[str, Any]  # a config.json
FULL, SLIDING = "full_attention", "sliding_attention"
# Lists with one entry a layer are made before weights are read: a damaged config.json must not fill the memory.
MAX_LAYERS = 10_000
MAX_EXPERTS = 1024


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """One `model_type` of transformers."""

    model_type: str
    # Fields of the specification that all models of the family have in common.
    spec: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    # Key of config.json -> field of the specification; null there is 0 here.
    keys: Mapping[str, str] = dataclasses.field(default_factory=dict)
    activation: str = "hidden_act"  # its key
    bias: str = ""  # attention projections with a bias where `attention_bias` is true; "": it must be false
    mlp_bias: bool = False  # whether `mlp_bias` may be true
    windows: str = ""  # the layers that have one: "some", those of `layer_types`, "all", or none ("")
    local_theta: float = 0.0  # base of the rotary angles of layers with a window; 0: as in the others
    skips_rope: bool = False  # whether some layers have no rotary embedding
    scales_embedding: bool = False  # by the root of the width
    experts: str = ""  # key of the number of experts; "": the mlp is not routed
    expert_width: str = "intermediate_size"  # key of the width of an expert
    normalized: bool = False  # the weights of a token's experts sum to 1, whatever `norm_topk_prob` says
    text_of: str = ""  # `model_type` of multimodal models whose `text_config` is of this family


def number(value: Any, kind: type, key: str, where: str) -> Any:
    """`value` as a positive int or float, refusing strings, booleans and fractions of an int."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 < value <= sys.float_info.max or (kind is int and value != int(value)):
        raise UserError(
            f"{where}: {key} is {value!r}, not a positive {'integer' if kind is int else 'number'}"
        )
    return kind(value)


_GEMMA: dict[str, Any] = dict(
    spec={"norm_position": "both", "norm_offset": 1.0},
    activation="hidden_activation",
    scales_embedding=True,
    keys={"query_pre_attn_scalar": "query_scale", "final_logit_softcapping": "logit_softcap"},
)
# In the order in which an export tries them.
FAMILIES = (
    Family(model_type="llama", bias="qkvo", mlp_bias=True),
    Family(model_type="mistral", windows="all"),
    Family(model_type="qwen2", spec={"attention_bias": "qkv"}, windows="some"),
    Family(model_type="qwen3", spec={"qk_norm": "head"}, bias="qkvo", windows="some"),
    # Fused projections are cut on import (`hf_weights.py`); an export is of the first family that says the same.
    Family(model_type="phi3", windows="all"),
    Family(model_type="mixtral", windows="all", experts="num_local_experts", normalized=True),
    Family(
        model_type="qwen3_moe",
        spec={"qk_norm": "head"},
        bias="qkvo",
        windows="all",
        experts="num_experts",
        expert_width="moe_intermediate_size",
    ),
    Family(model_type="olmoe", spec={"qk_norm": "width"}, bias="qkvo", experts="num_experts"),
    Family(model_type="smollm3", bias="qkvo", mlp_bias=True, skips_rope=True),
    Family(model_type="olmo2", spec={"qk_norm": "width", "norm_position": "post"}, bias="qkvo"),
    Family(
        model_type="gemma2",
        windows="some",
        bias="qkvo",
        # Gemma 3's config.json may have this key too; transformers does not cap its scores.
        **_GEMMA | {"keys": {**_GEMMA["keys"], "attn_logit_softcapping": "attention_softcap"}},
    ),
    Family(
        model_type="gemma3_text",
        text_of="gemma3",
        windows="some",
        local_theta=10_000.0,
        bias="qkvo",
        **_GEMMA | {"spec": {**_GEMMA["spec"], "qk_norm": "head"}},
    ),
)
TEXT_OF = {family.text_of: family for family in FAMILIES if family.text_of}
BY_NAME = {family.model_type: family for family in FAMILIES}
_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}


def spec_fields(family: Family, raw: Raw, where: str) -> dict[str, Any]:
    """The fields of the specification beyond Llama's, from a config.json that transformers has completed.

    Raises UserError: a key says what the specification cannot.
    """
    fields: dict[str, Any] = dict(family.spec)
    for key, field in family.keys.items():
        fields[field] = 0.0 if raw.get(key) is None else number(raw[key], float, key, where)
    activation = raw[family.activation]
    if activation not in _ACTIVATIONS:
        raise UserError(
            f"{where}: {family.activation} is {activation!r}; implemented are {', '.join(_ACTIVATIONS)}"
        )
    fields["activation"] = _ACTIVATIONS[activation]
    for key, possible in (
        ("attention_bias", family.bias),
        ("mlp_bias", family.mlp_bias),
        ("use_bidirectional_attention", False),
    ):
        if raw.get(key) and not possible:
            raise UserError(
                f"{where}: {key} is {raw[key]!r}; models of type {family.model_type} do not have it here"
            )
    if not raw.get("is_causal", True):
        raise UserError(
            f"{where}: is_causal is {raw['is_causal']!r}; a token can only attend to those before it"
        )
    if raw.get("attention_bias"):
        fields["attention_bias"] = family.bias
    fields["mlp_bias"] = bool(raw.get("mlp_bias"))
    if family.scales_embedding:
        fields["embedding_multiplier"] = raw["hidden_size"] ** 0.5
    window, period = _window(family, raw, where)
    fields |= {"sliding_window": window, "full_attention_every": period}
    if family.local_theta and window:
        rope = raw["rope_parameters"][SLIDING]
        if rope["rope_type"] != "default":
            raise UserError(
                f"{where}: rope_parameters.{SLIDING} has the type {rope['rope_type']!r}; only default is implemented"
            )
        fields["rope_local_theta"] = number(rope["rope_theta"], float, "rope_local_base_freq", where)
    if family.skips_rope:
        rotated = raw["no_rope_layers"]  # 1: has a rotary embedding
        fields["rope_skip_every"] = _period([not flag for flag in rotated], "no_rope_layers", where)
    if family.experts:
        fields |= _experts(family, raw, where)
    return fields


def _experts(family: Family, raw: Raw, where: str) -> dict[str, Any]:
    for key, neutral in (("mlp_only_layers", []), ("decoder_sparse_step", 1), ("clip_qkv", None)):
        if raw.get(key) not in (neutral, None):
            raise UserError(f"{where}: {key} is {raw[key]!r:.100}; only {neutral!r} is implemented")
    # transformers 5 writes `num_local_experts` for all.
    key = "num_local_experts" if "num_local_experts" in raw else family.experts
    count = number(raw[key], int, key, where)
    if count > MAX_EXPERTS:
        raise UserError(f"{where}: {key} is {count}; at most {MAX_EXPERTS} are possible")
    width, heads_width = raw["hidden_size"], raw["num_attention_heads"] * raw["head_dim"]
    if family.spec.get("qk_norm") == "width" and heads_width != width:  # the norms have the model's width
        raise UserError(f"{where}: heads of together {heads_width} channels and hidden_size {width} differ")
    return {
        "num_experts": count,
        "experts_per_token": number(raw["num_experts_per_tok"], int, "num_experts_per_tok", where),
        "intermediate_size": number(raw[family.expert_width], int, family.expert_width, where),
        "normalize_expert_weights": family.normalized or raw["norm_topk_prob"],
    }


def _window(family: Family, raw: Raw, where: str) -> tuple[int, int]:
    """(positions of the window, which layers have none: `full_attention_every`)."""
    window, kinds = raw.get("sliding_window"), raw.get("layer_types")
    if window is not None and not family.windows:
        raise UserError(
            f"{where}: sliding_window is {window!r}, but models of type {family.model_type} have none (null)"
        )
    usual = FULL if window is None else SLIDING
    kinds = [usual] * raw["num_hidden_layers"] if kinds is None else kinds
    if not set(kinds) <= ({FULL, SLIDING} if family.windows == "some" else {usual}):
        raise UserError(
            f"{where}: layer_types is {kinds!r:.100}; models of type {family.model_type} do not have it here"
        )
    if SLIDING not in kinds:
        return 0, 0
    window = number(window, int, "sliding_window", where)
    return window, _period([kind == FULL for kind in kinds], "layer_types", where)


def _period(mask: list[bool], key: str, where: str) -> int:
    """n, if every n-th layer and no other is marked; 0 if none is."""
    if not any(mask):
        return 0
    period = mask.index(True) + 1
    if mask != [(layer + 1) % period == 0 for layer in range(len(mask))]:
        raise UserError(f"{where}: {key} has no period; only every n-th layer may differ from the others")
    return period


def config_keys(family: Family, config: DecoderConfig, rope: Raw) -> Raw:
    """The keys of config.json that say what the specification has beyond Llama's fields.

    `rope` has `rope_theta` and `rope_scaling` as the other families write them.
    """
    layers = range(config.num_hidden_layers)
    names = {name: hf_name for hf_name, name in reversed(_ACTIVATIONS.items())}
    raw: Raw = {key: getattr(config, field) or None for key, field in family.keys.items()}
    if "query_pre_attn_scalar" in raw:
        scale = config.query_scale or config.head_dim
        raw["query_pre_attn_scalar"] = int(scale) if scale == int(scale) else scale
    raw[family.activation] = names[config.activation]
    raw["hidden_act"] = names[config.activation]
    raw["attention_bias"] = bool(family.bias) and config.attention_bias == family.bias
    raw["mlp_bias"] = config.mlp_bias
    if family.windows:
        raw["sliding_window"] = config.sliding_window or None
        raw["use_sliding_window"] = config.sliding_window > 0
    if family.windows == "some":
        # some models fail on null, though no layer reads it
        raw["sliding_window"] = config.sliding_window or config.max_position_embeddings
        raw["layer_types"] = [FULL if config.attends_fully(layer) else SLIDING for layer in layers]
    if family.skips_rope:
        period = config.rope_skip_every
        raw["no_rope_layers"] = [int(not period or (layer + 1) % period != 0) for layer in layers]
    if family.experts:
        raw |= {family.experts: config.num_experts, family.expert_width: config.intermediate_size}
        raw["num_experts_per_tok"] = config.experts_per_token
        raw["norm_topk_prob"] = config.normalize_expert_weights
    if not family.local_theta:
        return raw | rope
    local = config.rope_local_theta or family.local_theta
    nested = {
        FULL: {"rope_type": "default", **(rope["rope_scaling"] or {}), "rope_theta": config.rope_theta},
        SLIDING: {"rope_type": "default", "rope_theta": local},
    }
    # transformers 4 knows only the flat keys.
    return raw | rope | {"rope_local_base_freq": local, "rope_parameters": nested}
