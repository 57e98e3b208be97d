"""Published model shapes as data, from the `config.json` of each model on Hugging Face."""

import dataclasses

from lemur_jax.common.errors import UserError
from lemur_jax.models.config import LlamaConfig

_LLAMA2 = dict(vocab_size=32_000, rms_norm_eps=1e-5, max_position_embeddings=4096, rope_theta=10_000.0)
_LLAMA3 = dict(
    vocab_size=128_256,
    rms_norm_eps=1e-5,
    max_position_embeddings=131_072,
    rope_theta=500_000.0,
    rope_scaling="llama3",
    rope_low_freq_factor=1.0,
    rope_high_freq_factor=4.0,
    rope_original_max_position_embeddings=8192,
)
_SIZE_7B = dict(
    hidden_size=4096,
    intermediate_size=11_008,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=32,
    head_dim=128,
)
_SIZE_70B = dict(
    hidden_size=8192,
    intermediate_size=28_672,
    num_hidden_layers=80,
    num_attention_heads=64,
    num_key_value_heads=8,
    head_dim=128,
)

PRESETS: dict[str, LlamaConfig] = {
    # For tests and for a first look: seconds on a laptop.
    "tiny": LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=1024,
    ),
    # The quickstart's: minutes on two cores.
    "quickstart": LlamaConfig(
        vocab_size=4000,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=1024,
    ),
    # GPT-2 small's proportions with Llama's blocks and Llama-2's vocabulary.
    "llama_125m": LlamaConfig(
        **_LLAMA2,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=12,
        head_dim=64,
    ),
    "llama3.2_1b": LlamaConfig(
        **_LLAMA3,
        rope_factor=32.0,
        tie_word_embeddings=True,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
    ),
    "llama2_7b": LlamaConfig(**_LLAMA2, **_SIZE_7B),
    "llama2_13b": LlamaConfig(
        **_LLAMA2,
        hidden_size=5120,
        intermediate_size=13_824,
        num_hidden_layers=40,
        num_attention_heads=40,
        num_key_value_heads=40,
        head_dim=128,
    ),
    "llama2_70b": LlamaConfig(**_LLAMA2, **_SIZE_70B),
    "codellama_7b": LlamaConfig(
        **_SIZE_7B, vocab_size=32_016, max_position_embeddings=16_384, rope_theta=1_000_000.0
    ),
    "codellama_34b": LlamaConfig(
        vocab_size=32_000,
        max_position_embeddings=16_384,
        rope_theta=1_000_000.0,
        hidden_size=8192,
        intermediate_size=22_016,
        num_hidden_layers=48,
        num_attention_heads=64,
        num_key_value_heads=8,
        head_dim=128,
    ),
    "llama3.1_8b": LlamaConfig(
        **_LLAMA3,
        rope_factor=8.0,
        hidden_size=4096,
        intermediate_size=14_336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
    ),
    "llama3.1_70b": LlamaConfig(**_LLAMA3, **_SIZE_70B, rope_factor=8.0),
    # Llama-2-70B with StarCoder's special tokens, rounded up to a multiple of 8.
    "lemur_70b": LlamaConfig(**{**_LLAMA2, "vocab_size": 32_024}, **_SIZE_70B),
    # Llama-2-70B with <pad> and the ChatML tokens.
    "lemur_70b_chat": LlamaConfig(**{**_LLAMA2, "vocab_size": 32_005}, **_SIZE_70B),
}


def preset(name: str, **changes) -> LlamaConfig:
    """The published shape `name`, with some fields changed.

    Raises:
      UserError: no preset has that name.
    """
    if name not in PRESETS:
        raise UserError(f"unknown model preset {name!r}: it must be one of {', '.join(PRESETS)}")
    return dataclasses.replace(PRESETS[name], **changes)
