"""`config.model`, the specification of a decoder, and `config.compute`."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from lemur_jax.common.errors import UserError
from lemur_jax.common.sections import require, require_one_of

# Values of the fields of `DecoderConfig` that name a choice.
CHOICES = {
    "rope_scaling": ("none", "linear", "llama3", "yarn", "longrope"),
    "norm_position": ("pre", "post", "both"),
    "qk_norm": ("", "head", "width"),
    "attention_bias": ("", "qkv", "qkvo"),
    "activation": ("silu", "gelu", "gelu_tanh"),
}
# Names of models/remat.py, from most recomputed to nothing recomputed.
REMAT_POLICIES = (
    *("full", "attention", "attention_all", "mlp", "mlp_gate", "mlp_all", "dots"),
    *("offload_full", "offload_attention", "offload_mlp", "offload_all", "none"),
)
# Those of them that keep the whole gate of the mlp.
KEEP_GATE = ("mlp_gate", "mlp_all", "dots", "offload_all", "none")
ATTENTION_NAMES = ("auto", "xla", "splash", "cudnn")

# Fields of `DecoderConfig` that are divisors or bases, and those that may be negative.
_POSITIVE = ("rope_theta", "rope_factor", "rope_beta_fast", "rope_beta_slow")
_ANY_SIGN = ("norm_offset", "embedding_multiplier", "residual_multiplier")

_WINDOW = "above 0 where model.rope_local_theta or model.full_attention_every is set"


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Specification of a decoder: what it computes, whatever family it belongs to.

    The first fields have the names and meanings of `transformers.LlamaConfig`. The others say what a model does
    differently from Llama; their defaults are Llama's. `convert/families.py` translates each family's `config.json`.
    """

    vocab_size: int  # rows V of the embedding and of the head
    hidden_size: int  # model width D
    intermediate_size: int  # width F of the SwiGLU hidden layer
    num_hidden_layers: int  # layers L
    num_attention_heads: int  # query heads H
    num_key_value_heads: int  # key and value heads K; H must be a multiple of K
    head_dim: int  # width N of one head
    rms_norm_eps: float = 1e-5  # epsilon inside the root of RMSNorm
    max_position_embeddings: int = 4096  # longest sequence that the model supports, in tokens
    tie_word_embeddings: bool = False  # whether the head is the transposed embedding
    rope_theta: float = 10_000.0  # base of the rotary frequencies
    rope_scaling: str = "none"  # or "linear" (positions / `rope_factor`), "llama3", "yarn", "longrope"
    rope_factor: float = 1.0  # factor of all scalings
    rope_low_freq_factor: float = 1.0  # of Llama-3 scaling
    rope_high_freq_factor: float = 4.0  # of Llama-3 scaling
    rope_original_max_position_embeddings: int = 8192  # of Llama-3, YaRN and LongRoPE scaling
    rope_beta_fast: float = 32.0  # YaRN: no scaling with more rotations in the original length
    rope_beta_slow: float = 1.0  # YaRN: division by `rope_factor` with fewer rotations
    rope_attention_factor: float = 0.0  # YaRN, LongRoPE: multiplies cosine and sine; 0: from `rope_factor`
    rope_short_factor: tuple[float, ...] = ()  # LongRoPE: divisor of each pair's frequency in short sequences
    rope_long_factor: tuple[float, ...] = ()  # LongRoPE: the same in sequences beyond the original length
    rope_local_theta: float = 0.0  # base in layers with a window, without scaling; 0: as in the other layers
    rope_skip_every: int = 0  # n: every n-th layer has no rotary embedding; 0: all have one
    attention_bias: str = ""  # attention projections with a bias: "", "qkv" or "qkvo"
    mlp_bias: bool = False  # whether the projections of the mlp have a bias
    num_experts: int = 0  # experts of a layer, each of width `intermediate_size`; 0: a dense mlp
    experts_per_token: int = 0  # experts that a token is routed to, by largest router probability
    normalize_expert_weights: bool = True  # whether the weights of a token's experts sum to 1
    qk_norm: str = ""  # RMSNorm of queries and keys before rotation: of each "head", the "width", or none
    sliding_window: int = 0  # positions that a query attends to, including its own; 0: all before it
    full_attention_every: int = 0  # n: every n-th layer has no window; 0: the window is in all layers
    query_scale: float = 0.0  # attention scores are divided by its square root; 0: that of `head_dim`
    attention_softcap: float = 0.0  # c: scores s become c tanh(s / c); 0: none
    logit_softcap: float = 0.0  # the same for logits
    norm_position: str = "pre"  # norms before each sublayer ("pre"), after it ("post"), or "both"
    norm_offset: float = 0.0  # added to the scales of the norms
    embedding_multiplier: float = 1.0  # multiplies the token embedding
    residual_multiplier: float = 1.0  # multiplies the outputs of attention and mlp
    activation: str = "silu"  # activation of the mlp's gate: "silu", "gelu" or "gelu_tanh"
    initializer_range: float = 0.02  # standard deviation of the initial weights

    def __post_init__(self):
        for field in dataclasses.fields(self):
            key, value, minimum = f"model.{field.name}", getattr(self, field.name), int(field.default != 0)
            if field.type is int:
                require(minimum <= value < 2**31, key, value, f"at least {minimum}, and below 2^31")
            elif field.name in _POSITIVE:
                require(value > 0, key, value, "above 0")
            elif field.type is float and field.name not in _ANY_SIGN:
                require(value >= 0, key, value, "0 or more")
        if self.num_attention_heads % self.num_key_value_heads:
            raise UserError(
                f"model.num_attention_heads is {self.num_attention_heads}, not a multiple of"
                f" model.num_key_value_heads {self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise UserError(f"model.head_dim is {self.head_dim}: rotary embedding needs an even one")
        for name, choices in CHOICES.items():
            require_one_of(f"model.{name}", getattr(self, name), choices)
        low, high = self.rope_low_freq_factor, self.rope_high_freq_factor
        above = f"above model.rope_low_freq_factor {low} with llama3 scaling"
        require(self.rope_scaling != "llama3" or high > low, "model.rope_high_freq_factor", high, above)
        pairs = self.head_dim // 2 if self.rope_scaling == "longrope" else 0
        for name in ("rope_short_factor", "rope_long_factor"):
            factors = tuple(getattr(self, name))
            object.__setattr__(self, name, factors)  # JSON has lists
            valid = len(factors) == pairs and min(factors, default=1) > 0
            require(
                valid, f"model.{name}", factors, f"{pairs} positive numbers with {self.rope_scaling} scaling"
            )
        E, K = self.num_experts, self.experts_per_token
        most = f"1 to model.num_experts {E}, or both 0"
        require(1 <= K <= E or not (K or E), "model.experts_per_token", K, most)
        require(not (E and self.mlp_bias), "model.mlp_bias", self.mlp_bias, "false with experts")
        local = self.rope_local_theta or self.full_attention_every
        require(not local or self.sliding_window > 0, "model.sliding_window", self.sliding_window, _WINDOW)

    @property
    def active_mlp_width(self) -> int:
        """Elements of the mlp's hidden layer that a token uses."""
        return self.intermediate_size * (self.experts_per_token or 1)

    def attends_fully(self, layer):
        """Whether the layer with this index, an int or an int32 array [], attends without a window."""
        return (
            (layer + 1) % self.full_attention_every == 0
            if self.full_attention_every
            else not self.sliding_window
        )

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "DecoderConfig":
        """The inverse of `to_dict`; names that are no fields are ignored."""
        return cls(
            **{field.name: fields[field.name] for field in dataclasses.fields(cls) if field.name in fields}
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """Low-rank adapters beside frozen parameters, see models/lora.py."""

    rank: int = 0  # R; 0: no adapter, all parameters are trained
    alpha: float = 16.0  # the adapter is scaled by alpha / rank
    rslora: bool = False  # scale by alpha / sqrt(rank) instead
    dropout: float = 0.0  # dropout of the adapter's inputs
    targets: tuple[str, ...] = ("layers/*",)  # patterns of projections, e.g. "layers/attention/*", "*/query"
    base_dtype: str = "bfloat16"  # of frozen parameters: "float32", "bfloat16", "int8" (matrices)
    checkpoint: str = ""  # a PEFT adapter directory to start from; "": a fresh adapter

    def __post_init__(self):
        require(self.rank >= 0, "adapter.rank", self.rank, "0 or more")
        require(self.alpha > 0, "adapter.alpha", self.alpha, "above 0")
        if self.checkpoint and not self.rank:
            raise UserError(
                "config.adapter.checkpoint is read only with config.adapter.rank: set that of the adapter"
            )
        require(0 <= self.dropout < 1, "adapter.dropout", self.dropout, "in [0, 1)")
        require_one_of("adapter.base_dtype", self.base_dtype, ("float32", "bfloat16", "int8"))
        require(len(self.targets) > 0, "adapter.targets", self.targets, "one pattern or more")

    @property
    def scale(self) -> float:
        """The factor of the update."""
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ComputeConfig:
    """How the model is computed: affects speed and memory, not results (up to rounding)."""

    dtype: str = "bfloat16"  # dtype of activations and matmul inputs
    param_dtype: str = "float32"  # dtype of the master parameters
    remat: str = "full"  # rematerialization policy: what the backward pass keeps, see models/remat.py
    gate_share: float = 0.0  # share of the mlp's gate that is kept too, on the host where `remat` offloads
    reduce_dtype: str = ""  # dtype of gradient reductions: "float32", "bfloat16"; "": as dtype
    attention: str = "auto"  # "auto", "xla", "splash" or "cudnn"
    attention_blocks: tuple[int, ...] = (0, 0)  # splash's block sizes, forward and backward; 0: by the TPU
    product_dtype: str = ""  # of matmuls in layers: "int8", "float8", "float8_per_tensor"; "": as dtype
    loss_chunk: int = 512  # positions whose logits exist at a time, rounded to a divisor; 0: all
    compiler_options: tuple[str, ...] = ()  # for XLA:TPU, "name=value"; see parallel/compiler_flags.py

    def __post_init__(self):
        require_one_of("compute.dtype", self.dtype, ("float32", "bfloat16", "float16"))
        # Squares of gradients, which optimizers keep in this dtype, are 0 in float16.
        require_one_of("compute.param_dtype", self.param_dtype, ("float32", "bfloat16"))
        require_one_of("compute.reduce_dtype", self.reduce_dtype, ("", "float32", "bfloat16"))
        require_one_of(
            "compute.product_dtype", self.product_dtype, ("", "int8", "float8", "float8_per_tensor")
        )
        require_one_of("compute.remat", self.remat, REMAT_POLICIES)
        require(0 <= self.gate_share < 1, "compute.gate_share", self.gate_share, "in [0, 1)")
        rule = f"0 with compute.remat {self.remat!r}, which keeps the whole gate"
        require(
            not self.gate_share or self.remat not in KEEP_GATE, "compute.gate_share", self.gate_share, rule
        )
        require_one_of("compute.attention", self.attention, ATTENTION_NAMES)
        require(self.loss_chunk >= 0, "compute.loss_chunk", self.loss_chunk, "0 or more")
        blocks = self.attention_blocks
        valid = len(blocks) == 2 and min(blocks) >= 0
        require(valid, "compute.attention_blocks", blocks, "two numbers, for forward and backward")
