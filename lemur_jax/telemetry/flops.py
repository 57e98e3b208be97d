"""Model FLOPs of a decoder by formula, peak FLOP/s of chips, and MFU.

Axes: T sequence length, D model, H query heads, K key/value heads, N head width, F mlp, V vocabulary, L layers.

Model FLOPs are those of the matrix products alone, without rematerialization (Chowdhery et al. 2022, "PaLM", appendix
B): a product of [a, b] and [b, c] costs 2abc, and the backward pass twice the forward. PaLM counts attention to all T
keys; the causal count takes the (T + 1) / 2 keys of the average query. An MFU must say which of the two it uses.
"""

import dataclasses

from lemur_jax.models.config import DecoderConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenFlops:
    """Model FLOPs of one token, by part."""

    projections: float  # query, key, value and output
    attention: float  # scores and weighted sum of values
    mlp: float  # the three products of SwiGLU, of a token's experts alone, and the router
    head: float  # logits

    @property
    def total(self) -> float:
        return self.projections + self.attention + self.mlp + self.head


def flops_per_token(
    config: DecoderConfig, sequence_length: int, *, causal: bool = True, backward: bool = True
) -> TokenFlops:
    """Model FLOPs of one token in a sequence of `sequence_length` = T tokens.

    Packed documents that do not see each other need less attention than this; that is not counted.

    Args:
      causal: count the (T + 1) / 2 keys that a query sees on average, else all T.
      backward: forward and backward (training), else forward alone.
    """
    L, N = config.num_hidden_layers, config.head_dim
    H, K = config.num_attention_heads, config.num_key_value_heads
    full = sum(bool(config.attends_fully(layer)) for layer in range(L)) / L
    keys = full * _keys(sequence_length, sequence_length, causal)
    keys += (1 - full) * _keys(sequence_length, config.sliding_window, causal)
    factor = 2.0 * (3 if backward else 1)  # a multiplication and an addition, in one or three passes
    return TokenFlops(
        projections=factor * L * config.hidden_size * (2 * H + 2 * K) * N,
        attention=factor * L * 2 * H * N * keys,
        mlp=factor * L * config.hidden_size * (3 * config.active_mlp_width + config.num_experts),
        head=factor * config.vocab_size * config.hidden_size,
    )


def train_flops_per_token(
    config: DecoderConfig, sequence_length: int, adapter: bool = False, *, causal: bool = True
) -> float:
    """Model FLOPs of a trained token: three passes, or two with an adapter, whose own products are left out."""
    total = flops_per_token(config, sequence_length, causal=causal).total
    return total * 2 / 3 if adapter else total


def _keys(T: int, window: int, causal: bool) -> float:
    """Keys that a query sees on average."""
    if not causal or window >= T:
        return (T + 1) / 2 if causal else min(T, window)
    return window - window * (window - 1) / (2 * T)


@dataclasses.dataclass(frozen=True)
class Chip:
    """An accelerator."""

    name: str
    bf16_flops: float  # peak dense bfloat16 FLOP/s of one chip, without structured sparsity
    devices: int = 1  # JAX devices that one chip appears as

    @property
    def flops_per_device(self) -> float:
        """Peak dense bfloat16 FLOP/s of one JAX device."""
        return self.bf16_flops / self.devices


# By prefix of `jax.Device.device_kind`; the longest that matches counts. TPU kinds are those of libtpu's
# topologies. Peaks: https://cloud.google.com/tpu/docs/v4 (v5e, v5p, v6e, tpu7x) and
# https://www.nvidia.com/en-us/data-center/a100/ (h100, h200); NVIDIA publishes Hopper's with 2:4 sparsity: halved here.
CHIPS: dict[str, Chip] = {
    "TPU v4": Chip("TPU v4", 275e12),
    "TPU v5 lite": Chip("TPU v5e", 197e12),
    "TPU v5e": Chip("TPU v5e", 197e12),
    "TPU v5": Chip("TPU v5p", 459e12),
    "TPU v6 lite": Chip("TPU v6e", 918e12),
    "TPU v6e": Chip("TPU v6e", 918e12),
    "TPU7x": Chip("TPU7x", 2307e12, devices=2),
    "NVIDIA A100": Chip("A100", 312e12),
    "NVIDIA H100": Chip("H100 SXM", 989.4e12),
    "NVIDIA H100 PCIe": Chip("H100 PCIe", 756e12),
    "NVIDIA H100 NVL": Chip("H100 NVL", 835.5e12),
    "NVIDIA H200": Chip("H200 SXM", 989.4e12),
    "NVIDIA H200 NVL": Chip("H200 NVL", 835.5e12),
}
# Other chips whose names begin like a known one.
_OTHERS = ("TPU v4 lite", "MIG")


def chip(device_kind: str) -> Chip | None:
    """The chip behind a `jax.Device.device_kind`; None if it is not in the table (a CPU, a MIG slice)."""
    if any(other in device_kind for other in _OTHERS):
        return None
    prefixes = [start for start in CHIPS if device_kind.startswith(start)]
    return CHIPS[max(prefixes, key=len)] if prefixes else None


def mfu(tokens_per_second: float, token_flops: float, peak_flops: float) -> float:
    """Model FLOPs utilization, 0 to 1, from tokens/s, FLOPs of a token, and peak FLOP/s of all devices together."""
    return tokens_per_second * token_flops / peak_flops
