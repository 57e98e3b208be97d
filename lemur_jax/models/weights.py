"""Weights, biases and activations of the decoder's modules."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from lemur_jax.models.config import DecoderConfig
from lemur_jax.parallel.rules import spec

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


def split_weight(weight: nnx.Param, axis: str, share: float, mesh: Mesh | None) -> list[nnx.Param]:
    """The weight cut in two along a logical axis: about `share` of what each device has, and the rest.

    The first part is a multiple of 128. If that is 0 or all, the weight is not cut.
    """
    if not share:
        return [weight]
    array = weight.get_value()
    dim = weight.axes.index(axis)
    sharded = mesh is not None and spec(mesh, weight.axes, array.shape)[dim] == "tensor"
    blocks = mesh.shape["tensor"] if mesh is not None and sharded else 1
    leading, size, trailing = array.shape[:dim], array.shape[dim] // blocks, array.shape[dim + 1 :]
    first = round(share * size / 128) * 128
    if not 0 < first < size:
        return [weight]
    parts = jnp.split(array.reshape(*leading, blocks, size, *trailing), [first], axis=dim + 1)
    return [nnx.Param(part.reshape(*leading, -1, *trailing), axes=weight.axes) for part in parts]


def add_bias(x: jax.Array, bias: nnx.Param | None) -> jax.Array:
    """`x` plus the bias, if there is one; the bias has the last dimensions of `x`.

    In float32, as its gradient is a sum over all positions.
    """
    if bias is None:
        return x
    return (x.astype(jnp.float32) + bias.get_value().astype(jnp.float32)).astype(x.dtype)
