"""Weights, biases and activations of the decoder's modules."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from lemur_jax.models.config import DecoderConfig

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
}


def fresh_weight(config: DecoderConfig, rngs: nnx.Rngs, shape: tuple[int, ...], *axes: str) -> nnx.Param:
    """A fresh weight; `axes` are its logical axes (`parallel/rules.py`)."""
    return nnx.Param(config.initializer_range * jax.random.normal(rngs.params(), shape), axes=axes)


def fresh_bias(shape: tuple[int, ...], *axes: str) -> nnx.Param:
    """A fresh bias; the axis "norm" keeps it from weight decay."""
    return nnx.Param(jnp.zeros(shape), axes=axes)


def add_bias(x: jax.Array, bias: nnx.Param | None) -> jax.Array:
    """`x` plus the bias, if there is one; the bias has the last dimensions of `x`."""
    return x if bias is None else x + bias.get_value().astype(x.dtype)
