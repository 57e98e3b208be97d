"""Rotary position embedding.

Axes: B batch, T position, H heads, N head width.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from lemur_jax.models.config import DecoderConfig
from lemur_jax.parallel.mesh import platform
from lemur_jax.parallel.projection import einsum

Angles = tuple[jax.Array, jax.Array]  # cosine and sine


def inverse_frequencies(config: DecoderConfig, long: bool = False) -> np.ndarray:
    """Radians a position for each pair of channels: float32 [N/2] (Su et al. 2021, eq. 15).

    `long` chooses LongRoPE's factors for long texts (Ding et al. 2024).

    Llama-3 scaling as in Meta's `apply_scaling`: short wavelengths stay, long ones are divided by the factor, and
    between them it is interpolated. Float32 throughout, as published weights were trained with exactly these roundings.
    """
    one = np.float32(1)
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    frequencies = one / np.float32(config.rope_theta) ** exponents
    factor = np.float32(config.rope_factor)
    if config.rope_scaling == "linear":
        return frequencies / factor
    if config.rope_scaling == "llama3":
        original = np.float32(config.rope_original_max_position_embeddings)
        low, high = np.float32(config.rope_low_freq_factor), np.float32(config.rope_high_freq_factor)
        wavelengths = np.float32(2 * math.pi) / frequencies
        keep = np.clip((original / wavelengths - low) / (high - low), np.float32(0), one)
        return (one - keep) * frequencies / factor + keep * frequencies
    if config.rope_scaling == "longrope":
        factors = np.float32(config.rope_long_factor if long else config.rope_short_factor)
        return one / (factors * np.float32(config.rope_theta) ** exponents)
    if config.rope_scaling == "yarn":
        keep = one - _yarn_ramp(config)
        return (one - keep) * frequencies / factor + keep * frequencies
    return frequencies


def _yarn_ramp(config: DecoderConfig) -> np.ndarray:
    """How far each frequency is divided by the factor, 0 to 1: float32 [N/2] (Peng et al. 2023, eq. 18)."""

    def pair_index(rotations: float) -> float:
        """The pair of channels that makes this number of rotations over the original length."""
        length = config.rope_original_max_position_embeddings
        return (
            config.head_dim * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(config.rope_theta))
        )

    low = max(math.floor(pair_index(config.rope_beta_fast)), 0)
    high = min(math.ceil(pair_index(config.rope_beta_slow)), config.head_dim - 1)
    pairs = np.arange(config.head_dim // 2, dtype=np.float32)
    return np.clip((pairs - low) / np.float32(high - low or 0.001), 0, 1)


def angles_by_layer(
    config: DecoderConfig, positions: jax.Array, long: jax.Array | None = None
) -> Callable[[jax.Array], Angles]:
    """Rotary angles as a function of the layer's index, int32 []; arguments as in `rotary_angles`."""
    angles = rotary_angles(config, positions, long)
    if config.rope_local_theta:
        plain = {"rope_scaling": "none", "rope_short_factor": (), "rope_long_factor": ()}
        local = dataclasses.replace(config, rope_theta=config.rope_local_theta, **plain)
        windowed = rotary_angles(local, positions)
        return lambda layer: _choose(config.attends_fully(layer), angles, windowed)
    if config.rope_skip_every:
        identity = (jnp.ones_like(angles[0]), jnp.zeros_like(angles[1]))
        return lambda layer: _choose((layer + 1) % config.rope_skip_every == 0, identity, angles)
    return lambda layer: angles


def _choose(condition, yes: Angles, no: Angles) -> Angles:
    return jnp.where(condition, yes[0], no[0]), jnp.where(condition, yes[1], no[1])


def rotary_angles(config: DecoderConfig, positions: jax.Array, long: jax.Array | None = None) -> Angles:
    """Cosine and sine of the angles, float32 [B, T, 1, N/2], for int32 positions [B, T].

    Always float32: in bfloat16 the angle at position 2047 is wrong by up to 3.4 radians.

    Args:
      long: bool [B], rows that take LongRoPE's factors for long texts; None: segments longer than the original length,
        whose positions count from 0.
    """
    frequencies = jnp.asarray(inverse_frequencies(config))
    if config.rope_scaling == "longrope":
        original, T = config.rope_original_max_position_embeddings, positions.shape[1]
        if long is None:
            # Where this segment has position `original`, if at all.
            index = jnp.arange(T) - positions + original
            reached = jnp.take_along_axis(positions, jnp.clip(index, 0, T - 1), axis=1) == original
            long = (index < T) & reached
        long = long.reshape(len(positions), -1, 1, 1)  # [B, T or 1, 1, 1]
        frequencies = jnp.where(long, inverse_frequencies(config, long=True), frequencies)
    angles = positions.astype(jnp.float32)[..., None, None] * frequencies
    if config.rope_scaling not in ("yarn", "longrope"):
        return jnp.cos(angles), jnp.sin(angles)
    factor = config.rope_attention_factor or _attention_factor(config)
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def _attention_factor(config: DecoderConfig) -> float:
    """As the papers of YaRN (eq. 22) and LongRoPE recommend."""
    if config.rope_factor <= 1:
        return 1.0
    if config.rope_scaling == "yarn":
        return 0.1 * math.log(config.rope_factor) + 1
    return math.sqrt(
        1 + math.log(config.rope_factor) / math.log(config.rope_original_max_position_embeddings)
    )


def rotate(x: jax.Array, angles: Angles, mesh: Mesh | None = None) -> jax.Array:
    """Rotates [B, T, H, N] by the angles, in float32; returns x's dtype.

    Channel i is paired with channel i + N/2, as in Hugging Face's models.
    """
    if mesh is not None and platform(mesh) == "tpu":
        return rotate_by_matmul(x, angles)
    cos, sin = angles
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def rotate_by_matmul(x: jax.Array, angles: Angles) -> jax.Array:
    """`rotate` for TPU: the halves are swapped by a matrix of 0, 1 and -1.

    Splitting the 128 lanes of a head costs several passes over memory; this is one pass, and exact: every sum has one
    term that is not 0.
    """
    N = x.shape[-1]
    swap = np.zeros((N, N), np.float32)
    first, second = np.arange(N // 2), np.arange(N // 2, N)
    swap[second, first], swap[first, second] = -1, 1
    cos, sin = (jnp.concatenate([half, half], axis=-1) for half in angles)
    swapped = einsum("BTHN,NM->BTHM", x, jnp.asarray(swap, x.dtype), dtype="float32")
    return (x.astype(jnp.float32) * cos + swapped * sin).astype(x.dtype)
