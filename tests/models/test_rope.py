"""Rotary angles against transformers' own, at positions where a fault would show."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import LlamaConfig as HFConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from lemur_jax.models.presets import preset
from lemur_jax.models.rope import (
    angles_by_layer,
    inverse_frequencies,
    rotary_angles,
    rotate,
    rotate_by_matmul,
)

SCALINGS = {
    "llama2_7b": {"rope_type": "default", "rope_theta": 10_000.0},
    "codellama_7b": {"rope_type": "default", "rope_theta": 1_000_000.0},
    "llama3.1_8b": {
        "rope_type": "llama3",
        "rope_theta": 500_000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}


def theirs(name):
    config = preset(name)
    return LlamaRotaryEmbedding(
        HFConfig(
            hidden_size=config.hidden_size,
            num_attention_heads=config.num_attention_heads,
            head_dim=config.head_dim,
            max_position_embeddings=config.max_position_embeddings,
            rope_parameters=SCALINGS[name],
        )
    )


@pytest.mark.parametrize("name", SCALINGS)
def test_frequencies(name):
    np.testing.assert_allclose(inverse_frequencies(preset(name)), theirs(name).inv_freq.numpy(), rtol=3e-7)


def test_layers_with_a_window_are_not_scaled():
    scaled = preset(
        "gemma3_270m", rope_scaling="longrope", rope_short_factor=(2.0,) * 128, rope_long_factor=(3.0,) * 128
    )
    positions = jnp.arange(100)[None]
    local = preset("llama2_7b", head_dim=256, rope_theta=scaled.rope_local_theta)
    ours = angles_by_layer(scaled, positions)(jnp.int32(0))
    np.testing.assert_array_equal(ours, rotary_angles(local, positions))


@pytest.mark.parametrize("name", SCALINGS)
def test_rotation(name):
    config = preset(name)
    positions = np.array([[0, 1, 511, 2047, 4095]])
    x = np.random.default_rng(0).normal(size=(1, 5, 2, config.head_dim)).astype(np.float32)
    ours = rotate(jnp.asarray(x), rotary_angles(config, jnp.asarray(positions)))
    tensor = torch.tensor(x).transpose(1, 2)
    cos, sin = theirs(name)(tensor, torch.tensor(positions))
    expected, _ = apply_rotary_pos_emb(tensor, tensor, cos, sin)
    np.testing.assert_allclose(ours, expected.transpose(1, 2).numpy(), atol=2e-3)


def test_bfloat16_input_does_not_blur_the_angles():
    """A vector of ones, exact in bfloat16, must come out rotated by float32 angles."""
    config = preset("llama2_7b")
    ones = jnp.ones((1, 1, 1, config.head_dim), jnp.bfloat16)
    out = rotate(ones, rotary_angles(config, jnp.array([[2047]])))
    angles = 2047 * inverse_frequencies(config).astype(np.float64)
    expected = np.concatenate([np.cos(angles) - np.sin(angles), np.cos(angles) + np.sin(angles)])
    np.testing.assert_allclose(np.asarray(out, np.float32)[0, 0, 0], expected, atol=0.02)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_by_matmul_is_the_same_rotation(dtype):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 33, 4, 128)), dtype)
    positions = jnp.asarray(rng.integers(0, 4096, size=(2, 33)), jnp.int32)
    angles = rotary_angles(preset("llama2_7b"), positions)
    np.testing.assert_array_equal(
        np.asarray(rotate_by_matmul(x, angles), np.float32), np.asarray(rotate(x, angles), np.float32)
    )
