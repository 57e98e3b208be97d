"""`config.model`, the shape of a Llama in the names of Hugging Face's `config.json`, and `config.compute`."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from lemur_jax.common.errors import UserError
from lemur_jax.common.sections import require, require_one_of

ROPE_SCALINGS = ("none", "linear", "llama3")
# Names of models/remat.py, from most recomputed to nothing recomputed.
REMAT_POLICIES = (
    *("full", "attention", "attention_all", "mlp", "mlp_gate", "mlp_all", "dots"),
    *("offload_full", "offload_attention", "offload_mlp", "offload_all", "none"),
)
ATTENTION_NAMES = ("auto", "xla", "splash", "cudnn")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Architecture of one Llama model.

    Field names and meanings are those of `transformers.LlamaConfig`; the nested `rope_scaling`
    dictionary of Hugging Face is flattened into the `rope_*` fields.
    """

    vocab_size: int  # rows V of the embedding and of the head
    hidden_size: int  # model width D
    intermediate_size: int  # width F of the SwiGLU hidden layer
    num_hidden_layers: int  # layers L
    num_attention_heads: int  # query heads H
    num_key_value_heads: int  # key and value heads K; H must be a multiple of K
    head_dim: int  # width N of one head
    rms_norm_eps: float = 1e-5  # epsilon inside the root of RMSNorm
    max_position_embeddings: int = 4096  # longest sequence that the model was made for, in tokens
    tie_word_embeddings: bool = False  # whether the head is the transposed embedding
    rope_theta: float = 10_000.0  # base of the rotary angles
    rope_scaling: str = "none"  # "none", "linear" (positions divided by `rope_factor`) or "llama3"
    rope_factor: float = 1.0  # of linear and Llama-3 scaling
    rope_low_freq_factor: float = 1.0  # of Llama-3 scaling
    rope_high_freq_factor: float = 4.0  # of Llama-3 scaling
    rope_original_max_position_embeddings: int = 8192  # of Llama-3 scaling
    initializer_range: float = 0.02  # standard deviation of fresh weights

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type is int and value < 1:
                raise UserError(f"model.{field.name} is {value}: it must be at least 1")
        if self.num_attention_heads % self.num_key_value_heads:
            raise UserError(
                f"model.num_attention_heads is {self.num_attention_heads}, not a multiple of"
                f" model.num_key_value_heads {self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise UserError(f"model.head_dim is {self.head_dim}: rotary embedding needs an even one")
        if self.rope_scaling not in ROPE_SCALINGS:
            raise UserError(
                f"model.rope_scaling is {self.rope_scaling!r}: it must be one of {', '.join(ROPE_SCALINGS)}"
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
class ComputeConfig:
    """How the model is computed: affects speed and memory, not results (up to rounding)."""

    dtype: str = "bfloat16"  # of activations and matmul inputs
    param_dtype: str = "float32"  # of the master parameters
    remat: str = "full"  # what the backward pass keeps, a name in models/remat.py
    reduce_dtype: str = ""  # of weight gradients between devices: "float32", "bfloat16"; "": as dtype
    attention: str = "auto"  # "auto", "xla", "splash" or "cudnn"
    attention_blocks: tuple[int, ...] = (0, 0)  # of splash, forward and backward, in positions; 0: by the TPU
    loss_chunk: int = 512  # positions whose logits exist at a time, cut to what divides the length; 0: all
    compiler_options: tuple[str, ...] = ()  # more for XLA:TPU, "name=value" each; parallel/compiler_flags.py

    def __post_init__(self):
        for key in ("dtype", "param_dtype"):
            require_one_of(f"compute.{key}", getattr(self, key), ("float32", "bfloat16", "float16"))
        require_one_of("compute.reduce_dtype", self.reduce_dtype, ("", "float32", "bfloat16"))
        require_one_of("compute.remat", self.remat, REMAT_POLICIES)
        require_one_of("compute.attention", self.attention, ATTENTION_NAMES)
        require(self.loss_chunk >= 0, "compute.loss_chunk", self.loss_chunk, "0 or more")
        blocks = self.attention_blocks
        two = len(blocks) == 2 and min(blocks) >= 0
        require(two, "compute.attention_blocks", blocks, "two numbers, for forward and backward")
