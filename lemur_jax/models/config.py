"""The shape of a Llama: one frozen dataclass, in the names of Hugging Face's `config.json`."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from lemur_jax.common.errors import UserError

ROPE_SCALINGS = ("none", "linear", "llama3")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """Architecture of one Llama model.

    Field names and meanings are those of `transformers.LlamaConfig`; the nested `rope_scaling`
    dictionary of Hugging Face is flattened into the `rope_*` fields.

    Attributes:
      vocab_size: rows V of the embedding and of the head.
      hidden_size: model width D.
      intermediate_size: width F of the SwiGLU hidden layer.
      num_hidden_layers: layers L.
      num_attention_heads: query heads H.
      num_key_value_heads: key and value heads K; H must be a multiple of K.
      head_dim: width N of one head.
      rms_norm_eps: epsilon inside the root of RMSNorm.
      max_position_embeddings: longest sequence that the model was made for, in tokens.
      tie_word_embeddings: whether the head is the transposed embedding.
      rope_theta: base of the rotary angles.
      rope_scaling: "none", "linear" (positions divided by `rope_factor`) or "llama3".
      rope_factor, rope_low_freq_factor, rope_high_freq_factor,
        rope_original_max_position_embeddings: the numbers of linear and Llama-3 scaling.
      initializer_range: standard deviation of fresh weights.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-5
    max_position_embeddings: int = 4096
    tie_word_embeddings: bool = False
    rope_theta: float = 10_000.0
    rope_scaling: str = "none"
    rope_factor: float = 1.0
    rope_low_freq_factor: float = 1.0
    rope_high_freq_factor: float = 4.0
    rope_original_max_position_embeddings: int = 8192
    initializer_range: float = 0.02

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
    def from_dict(cls, fields: Mapping[str, Any]) -> "LlamaConfig":
        """The inverse of `to_dict`; also takes a `ConfigDict`."""
        return cls(
            **{field.name: fields[field.name] for field in dataclasses.fields(cls) if field.name in fields}
        )
