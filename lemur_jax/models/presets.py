"""Published model shapes as data, from the `config.json` of each model on Hugging Face."""

import dataclasses
from typing import Any

from lemur_jax.common.errors import UserError
from lemur_jax.models.config import DecoderConfig


def _shape(D: int, F: int, L: int, H: int, K: int, N: int = 128) -> dict[str, int]:
    """Width, mlp width, layers, query heads, key heads and head width."""
    return dict(
        hidden_size=D,
        intermediate_size=F,
        num_hidden_layers=L,
        num_attention_heads=H,
        num_key_value_heads=K,
        head_dim=N,
    )


_7B = _shape(4096, 11_008, 32, 32, 32)
_8B = _shape(4096, 14_336, 32, 32, 8)
_70B = _shape(8192, 28_672, 80, 64, 8)
_LLAMA2: dict[str, Any] = dict(vocab_size=32_000, max_position_embeddings=4096)
_CODELLAMA: dict[str, Any] = dict(max_position_embeddings=16_384, rope_theta=1_000_000.0)
_LLAMA3: dict[str, Any] = dict(
    vocab_size=128_256,
    max_position_embeddings=131_072,
    rope_theta=500_000.0,
    rope_scaling="llama3",
    rope_factor=8.0,
)
_LLAMA32: dict[str, Any] = _LLAMA3 | dict(rope_factor=32.0, tie_word_embeddings=True)
_SMOLLM2: dict[str, Any] = dict(vocab_size=49_152, max_position_embeddings=8192, tie_word_embeddings=True)
_MISTRAL: dict[str, Any] = _8B | dict(vocab_size=32_000, max_position_embeddings=32_768)
_QWEN: dict[str, Any] = dict(max_position_embeddings=32_768, rope_theta=1_000_000.0, rms_norm_eps=1e-6)
_QWEN25: dict[str, Any] = _QWEN | dict(vocab_size=152_064, attention_bias="qkv")
_QWEN3: dict[str, Any] = _QWEN | dict(max_position_embeddings=40_960, vocab_size=151_936, qk_norm="head")
_GEMMA: dict[str, Any] = dict(
    rms_norm_eps=1e-6, norm_position="both", norm_offset=1.0, activation="gelu_tanh", tie_word_embeddings=True
)
_GEMMA3: dict[str, Any] = _GEMMA | dict(
    max_position_embeddings=131_072,
    vocab_size=262_208,
    rope_theta=1_000_000.0,
    rope_scaling="linear",
    rope_factor=8.0,
    rope_local_theta=10_000.0,
    sliding_window=1024,
    full_attention_every=6,
    qk_norm="head",
)
_SMALL: dict[str, Any] = dict(max_position_embeddings=1024)

PRESETS: dict[str, DecoderConfig] = {
    # For tests and for a first look: seconds on a laptop.
    "tiny": DecoderConfig(**_SMALL, vocab_size=512, **_shape(64, 160, 2, 4, 2, 16)),
    # The quickstart's: minutes on two cores.
    "quickstart": DecoderConfig(**_SMALL, vocab_size=4000, **_shape(128, 352, 4, 4, 2, 32)),
    # GPT-2 small's proportions with Llama's blocks and Llama-2's vocabulary.
    "llama_125m": DecoderConfig(**_LLAMA2, **_shape(768, 2048, 12, 12, 12, 64)),
    "llama3.2_1b": DecoderConfig(**_LLAMA32, **_shape(2048, 8192, 16, 32, 8, 64)),
    "llama3.2_3b": DecoderConfig(**_LLAMA32, **_shape(3072, 8192, 28, 24, 8)),
    "llama1_7b": DecoderConfig(**_LLAMA2 | _7B | dict(max_position_embeddings=2048, rms_norm_eps=1e-6)),
    "llama2_7b": DecoderConfig(**_LLAMA2, **_7B),
    "llama2_13b": DecoderConfig(**_LLAMA2, **_shape(5120, 13_824, 40, 40, 40)),
    "llama2_70b": DecoderConfig(**_LLAMA2, **_70B),
    "codellama_7b": DecoderConfig(**_CODELLAMA, vocab_size=32_016, **_7B),
    "codellama_34b": DecoderConfig(**_CODELLAMA, vocab_size=32_000, **_shape(8192, 22_016, 48, 64, 8)),
    "llama3_8b": DecoderConfig(vocab_size=128_256, max_position_embeddings=8192, rope_theta=500_000.0, **_8B),
    "llama3.1_8b": DecoderConfig(**_LLAMA3, **_8B),
    "llama3.1_70b": DecoderConfig(**_LLAMA3, **_70B),
    "llama3.3_70b": DecoderConfig(**_LLAMA3, **_70B),
    "llama3.1_405b": DecoderConfig(**_LLAMA3, **_shape(16_384, 53_248, 126, 128, 8)),
    "smollm2_135m": DecoderConfig(**_SMOLLM2, rope_theta=100_000.0, **_shape(576, 1536, 30, 9, 3, 64)),
    "smollm2_1.7b": DecoderConfig(**_SMOLLM2, rope_theta=130_000.0, **_shape(2048, 8192, 24, 32, 32, 64)),
    "smollm3_3b": DecoderConfig(
        vocab_size=128_256,
        max_position_embeddings=65_536,
        rms_norm_eps=1e-6,
        rope_theta=5_000_000.0,
        rope_skip_every=4,
        tie_word_embeddings=True,
        **_shape(2048, 11_008, 36, 16, 4),
    ),
    "mistral_7b_v0.1": DecoderConfig(**_MISTRAL, sliding_window=4096),
    "mistral_7b_v0.3": DecoderConfig(**_MISTRAL | dict(vocab_size=32_768, rope_theta=1_000_000.0)),
    "qwen2.5_coder_7b": DecoderConfig(**_QWEN25, **_shape(3584, 18_944, 28, 28, 4)),
    "qwen2.5_coder_32b": DecoderConfig(**_QWEN25, **_shape(5120, 27_648, 64, 40, 8)),
    "qwen3_8b": DecoderConfig(**_QWEN3, **_shape(4096, 12_288, 36, 32, 8)),
    "qwen3_32b": DecoderConfig(**_QWEN3, **_shape(5120, 25_600, 64, 64, 8)),
    "olmo2_7b": DecoderConfig(
        vocab_size=100_352,
        rms_norm_eps=1e-6,
        rope_theta=500_000.0,
        qk_norm="width",
        norm_position="post",
        **_shape(4096, 11_008, 32, 32, 32),
    ),
    "phi4_14b": DecoderConfig(
        vocab_size=100_352,
        max_position_embeddings=16_384,
        rope_theta=250_000.0,
        **_shape(5120, 17_920, 40, 40, 10),
    ),
    "gemma2_9b": DecoderConfig(
        **_GEMMA,
        vocab_size=256_000,
        max_position_embeddings=8192,
        sliding_window=4096,
        full_attention_every=2,
        query_scale=256.0,
        attention_softcap=50.0,
        logit_softcap=30.0,
        embedding_multiplier=3584**0.5,
        **_shape(3584, 14_336, 42, 16, 8, 256),
    ),
    "gemma3_270m": DecoderConfig(
        **_GEMMA3
        | dict(vocab_size=262_144, max_position_embeddings=32_768, sliding_window=512)
        | dict(rope_scaling="none", rope_factor=1.0),
        query_scale=256.0,
        embedding_multiplier=640**0.5,
        **_shape(640, 2048, 18, 4, 1, 256),
    ),
    "gemma3_27b": DecoderConfig(
        **_GEMMA3,
        query_scale=168.0,
        embedding_multiplier=5376**0.5,
        **_shape(5376, 21_504, 62, 32, 16),
    ),
    "mixtral_8x7b": DecoderConfig(**_MISTRAL, rope_theta=1_000_000.0, num_experts=8, experts_per_token=2),
    "olmoe_1b_7b": DecoderConfig(
        vocab_size=50_304,
        qk_norm="width",
        num_experts=64,
        experts_per_token=8,
        normalize_expert_weights=False,
        **_shape(2048, 1024, 16, 16, 16),
    ),
    "qwen3_30b_a3b": DecoderConfig(
        **_QWEN3, num_experts=128, experts_per_token=8, **_shape(2048, 768, 48, 32, 4)
    ),
    # Llama-2-70B with StarCoder's special tokens, rounded up to a multiple of 8.
    "lemur_70b": DecoderConfig(**_LLAMA2 | _70B | dict(vocab_size=32_024)),
    # Llama-2-70B with <pad> and the ChatML tokens.
    "lemur_70b_chat": DecoderConfig(**_LLAMA2 | _70B | dict(vocab_size=32_005)),
}


def preset(name: str, **changes) -> DecoderConfig:
    """The published shape `name`, with some fields changed.

    Raises:
      UserError: no preset has that name.
    """
    if name not in PRESETS:
        raise UserError(f"unknown model preset {name!r}: it must be one of {', '.join(PRESETS)}")
    return dataclasses.replace(PRESETS[name], **changes)
