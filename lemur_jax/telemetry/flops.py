"""Parameters and model FLOPs of a Llama by formula, peak FLOP/s of the chips, and MFU.

Axes: T sequence length, D model, H query heads, K key/value heads, N head width, F mlp, V vocabulary,
L layers.

Model FLOPs are those of the matrix products that the mathematics asks for: a product of [a, b] and
[b, c] costs 2abc, and the backward pass costs twice the forward. Norms, rotary embedding, softmax,
the embedding lookup and whatever rematerialization computes again are not counted, as in the
definition of MFU (Chowdhery et al. 2022, "PaLM", appendix B). PaLM counts attention as if every
query saw all T keys; the causal count takes the (T + 1) / 2 keys that the average query sees. Both
are here, because an MFU without that word cannot be compared.
"""

import dataclasses

from lemur_jax.common.errors import UserError
from lemur_jax.models.config import LlamaConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParameterCounts:
    """Parameters by part; `head` is 0 when the head is the transposed embedding."""

    embedding: int
    attention: int
    mlp: int
    norms: int
    head: int

    @property
    def total(self) -> int:
        return self.embedding + self.attention + self.mlp + self.norms + self.head


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenFlops:
    """Model FLOPs of one token, by part.

    Attributes:
      projections: query, key, value and output products.
      attention: the two products over keys, scores and weighted sum of values.
      mlp: the three products of SwiGLU.
      head: logits.
    """

    projections: float
    attention: float
    mlp: float
    head: float

    @property
    def total(self) -> float:
        return self.projections + self.attention + self.mlp + self.head


def parameter_counts(config: LlamaConfig) -> ParameterCounts:
    """Parameters of the model that `config` describes."""
    V, D, L = config.vocab_size, config.hidden_size, config.num_hidden_layers
    return ParameterCounts(
        embedding=V * D,
        attention=L * _projection_parameters(config),
        mlp=L * 3 * D * config.intermediate_size,
        norms=(2 * L + 1) * D,
        head=0 if config.tie_word_embeddings else V * D,
    )


def flops_per_token(
    config: LlamaConfig, sequence_length: int, *, causal: bool = True, backward: bool = True
) -> TokenFlops:
    """Model FLOPs of one token in a sequence of `sequence_length` = T tokens.

    Packed documents that do not see each other need less attention than this; that is not counted.

    Args:
      causal: count the (T + 1) / 2 keys that a query sees on average, else all T.
      backward: forward and backward (training), else forward alone.

    Raises:
      UserError: a sequence length below 1.
    """
    if sequence_length < 1:
        raise UserError(f"the sequence length is {sequence_length}: it must be at least 1")
    L, HN = config.num_hidden_layers, config.num_attention_heads * config.head_dim
    keys = (sequence_length + 1) / 2 if causal else sequence_length
    each = 2.0 * (3 if backward else 1)  # a multiplication and an addition, in one or three passes
    return TokenFlops(
        projections=each * L * _projection_parameters(config),
        attention=each * L * 2 * HN * keys,
        mlp=each * L * 3 * config.hidden_size * config.intermediate_size,
        head=each * config.vocab_size * config.hidden_size,
    )


def _projection_parameters(config: LlamaConfig) -> int:
    """Query and output are D × HN, key and value D × KN; one layer."""
    heads = 2 * config.num_attention_heads + 2 * config.num_key_value_heads
    return config.hidden_size * heads * config.head_dim


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """An accelerator.

    Attributes:
      name: as people call it.
      bf16_flops: peak dense bfloat16 FLOP/s of one chip, without structured sparsity.
      devices: JAX devices that one chip appears as.
      source: where the peak is published.
    """

    name: str
    bf16_flops: float
    devices: int = 1
    source: str

    @property
    def flops_per_device(self) -> float:
        """Peak dense bfloat16 FLOP/s of one JAX device."""
        return self.bf16_flops / self.devices


_TPU = "https://cloud.google.com/tpu/docs/"
_NVIDIA = "https://www.nvidia.com/en-us/data-center/"
# NVIDIA publishes Hopper's peaks with 2:4 sparsity, twice the dense ones that stand here.
_SPARSE = " (published with sparsity; halved)"

_V5E = Chip(name="TPU v5e", bf16_flops=197e12, source=_TPU + "v5e")
_V5P = Chip(name="TPU v5p", bf16_flops=459e12, source=_TPU + "v5p")
_V6E = Chip(name="TPU v6e", bf16_flops=918e12, source=_TPU + "v6e")

# By the beginning of `jax.Device.device_kind`; of several that fit, the longest counts. The TPU names are
# those that libtpu's topologies report, and in jax/_src/pallas/mosaic/tpu_info.py.
CHIPS: dict[str, Chip] = {
    "TPU v4": Chip(name="TPU v4", bf16_flops=275e12, source=_TPU + "v4"),
    "TPU v5 lite": _V5E,
    "TPU v5e": _V5E,
    "TPU v5": _V5P,
    "TPU v6 lite": _V6E,
    "TPU v6e": _V6E,
    "TPU7x": Chip(name="TPU7x", bf16_flops=2307e12, devices=2, source=_TPU + "tpu7x"),
    "NVIDIA A100": Chip(name="A100", bf16_flops=312e12, source=_NVIDIA + "a100/"),
    "NVIDIA H100": Chip(name="H100 SXM", bf16_flops=989.4e12, source=_NVIDIA + "h100/" + _SPARSE),
    "NVIDIA H100 PCIe": Chip(name="H100 PCIe", bf16_flops=756e12, source=_NVIDIA + "h100/" + _SPARSE),
    "NVIDIA H100 NVL": Chip(name="H100 NVL", bf16_flops=835.5e12, source=_NVIDIA + "h100/" + _SPARSE),
    "NVIDIA H200": Chip(name="H200 SXM", bf16_flops=989.4e12, source=_NVIDIA + "h200/" + _SPARSE),
    "NVIDIA H200 NVL": Chip(name="H200 NVL", bf16_flops=835.5e12, source=_NVIDIA + "h200/" + _SPARSE),
}
# Other chips whose names begin like a known one.
_OTHERS = ("TPU v4 lite", "MIG")


def chip(device_kind: str) -> Chip | None:
    """The chip behind a `jax.Device.device_kind`; None if it is not in the table (a CPU, a MIG slice)."""
    if any(other in device_kind for other in _OTHERS):
        return None
    known = [start for start in CHIPS if device_kind.startswith(start)]
    return CHIPS[max(known, key=len)] if known else None


def mfu(tokens_per_second: float, token_flops: float, peak_flops: float) -> float:
    """Model FLOPs utilization, 0 to 1.

    Args:
      tokens_per_second: throughput of all devices together.
      token_flops: `flops_per_token(...).total`; say whether causal or full when you show the result.
      peak_flops: peak FLOP/s of all devices together.
    """
    return tokens_per_second * token_flops / peak_flops
