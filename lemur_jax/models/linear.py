"""Products with fully sharded weights that say how the weight's gradient is made and reduced.

In which dtype is the config's choice. By which collective is the TPU's: left to itself, XLA:TPU reduces a weight's
gradient over all of `fsdp` by an all-reduce of the whole matrix that computation waits for, and then throws all but
one slice away: 5 to 10% of a 70B step on a v4-512. In an exchange every device sends each slice of its own part of
the gradient to the device that keeps that slice, which adds up what it gets in float32. That is more traffic on the
wires, but the TPU sends it beside the computation, and bfloat16 is rounded once instead of at every hop.

The order of factors matters off TPU: XLA:CPU first copies the left one of a product that sums over its rows, so the
smaller one goes there; autodiff would put the gradient of the logits there. XLA would swap the factors again where the
weight has its axes in the other order, so a barrier keeps that transposition behind the product. And float32 gradients
of logits are rounded to the dtype of the activations, or a GPU would take its slow float32 path.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lemur_jax.parallel.rules import constrain, spec


class Reduction(NamedTuple):
    """How the gradient of a weight is added up over devices.

    Attributes:
      dtype: in which it travels.
      exchange: by an all-to-all and a local sum in float32; else as XLA chooses.
    """

    dtype: str
    exchange: bool


def is_quantized(param: Any) -> bool:
    """Whether this is a `qwix.QArray`, integers and their scales, and no array; told without importing qwix."""
    return hasattr(param, "qvalue")


def gathered(param: Any, axes: tuple[str, ...], mesh: Mesh | None, dtype) -> jax.Array:
    """The matrix in `dtype`, whole along `fsdp`.

    Cast first, so that half the bytes travel; the constraint makes the partitioner gather the weights rather
    than reduce activations. Of a `qwix.QArray` (`infer/quantize.py`) the integers travel.
    """
    whole = tuple("width" if axis == "embed" else axis for axis in axes)
    if not is_quantized(param):
        return constrain(param.astype(dtype), mesh, *whole)
    import qwix

    placed = jax.tree.map(lambda part: constrain(part, mesh, *scale_axes(whole, part.shape)), param)
    return qwix.dequantize(placed.astype(dtype))


def scale_axes(axes: tuple[str, ...], shape: tuple[int, ...]) -> tuple[str, ...]:
    """The logical axes of a matrix as those of its scales, which have size 1 along what is summed over."""
    return tuple("width" if size == 1 else axis for axis, size in zip(axes, shape, strict=True))


def product(equation: str, x: jax.Array, weight: jax.Array, dtype: str | None = None) -> jax.Array:
    """An einsum in the dtype of its inputs, or in `dtype`; float32 is not cut to bfloat16 on accelerators."""
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jnp.einsum(equation, x, weight, precision=precision, preferred_element_type=dtype)


def sharded_products(
    equations: tuple[str, ...],
    axes: tuple[tuple[str, ...], ...],
    mesh: Mesh,
    reduction: Reduction,
    x: jax.Array,
    params: tuple[jax.Array, ...],
    dtype: str | None = None,
) -> tuple[jax.Array, ...]:
    """`product(equation, x, gathered(param), dtype)` for each of `params`, their gradients reduced as above.

    Products that read the same `x` belong into one call: where weights are cut over `tensor`, each leaves a part of x's
    gradient on every device, and the parts are added up before they travel.

    Args:
      equations: an einsum a weight, with the batch B first in `x` and in the result, e.g. "BTD,DF->BTF".
      axes: logical axes of each weight, one of them "embed".
      mesh: the device mesh; its `data` × `fsdp` must divide B.
      reduction: of the gradients.
      x: activations, sharded over the batch.
      params: the master weights.
      dtype: of the results; None: as x.
    """
    return _with_own_gradient(equations, axes, mesh, reduction, dtype, x, params)


def _products(equations, axes, mesh, reduction, dtype, x, params) -> tuple[jax.Array, ...]:
    return tuple(
        product(equation, x, gathered(param, logical, mesh, x.dtype), dtype)
        for equation, logical, param in zip(equations, axes, params, strict=True)
    )


_with_own_gradient = jax.custom_vjp(_products, nondiff_argnums=(0, 1, 2, 3, 4))


def _forward(equations, axes, mesh, reduction, dtype, x, params):
    # The whole weight is gathered again in the backward pass rather than kept. The products themselves and not the
    # function above: a policy that keeps products (`dots`) does not look into functions with a gradient of their own.
    return _products(equations, axes, mesh, reduction, dtype, x, params), (x, params)


def _backward(equations, axes, mesh, reduction, dtype, saved, upstream):
    x, params = saved
    back, gradients = None, []
    for equation, logical, param, above in zip(equations, axes, params, upstream, strict=True):
        above = above.astype(x.dtype)
        inputs, result = equation.split("->")
        left, right = inputs.split(",")
        part = product(f"{result},{right}->{left}", above, gathered(param, logical, mesh, x.dtype))
        back = part if back is None else back + part
        gradients.append(_gradient(left, right, result, logical, mesh, reduction, x, above, param))
    if reduction.exchange:
        # Nobody goes on before all are there, so the scheduler puts the exchange beside the product `back`; else it
        # starts every exchange of a layer at the layer's end, where too little is left to hide it.
        back, gradients = jax.lax.optimization_barrier((back, gradients))
    return back, tuple(gradients)


def _gradient(left, right, result, axes, mesh, reduction, x, upstream, param) -> jax.Array:
    """The gradient of one weight, placed as the weight is."""
    placed = spec(mesh, axes, param.shape)
    if not reduction.exchange:
        factors = sorted([(x, left), (upstream, result)], key=lambda factor: factor[0].size)
        (small, first), (large, second) = factors
        made = right
        if mesh.devices.flat[0].platform == "cpu":
            made = "".join(sorted(right, key=lambda axis: axis in second))
        gradient = product(f"{first},{second}->{made}", small, large, reduction.dtype)
        if made != right:
            gradient = jnp.einsum(f"{made}->{right}", jax.lax.optimization_barrier(gradient))
        return _place(gradient, mesh, *placed).astype(param.dtype)

    def by_device(array):  # [B, ...] -> [data, fsdp, B / (data · fsdp), ...]
        return array.reshape(mesh.shape["data"], mesh.shape["fsdp"], -1, *array.shape[1:])

    own = product(f"XY{left},XY{result}->XY{right}", by_device(x), by_device(upstream), reduction.dtype)
    whole = (None if axis == "embed" else where for axis, where in zip(axes, placed, strict=True))
    own = _place(own, mesh, "data", "fsdp", *whole)
    slices = _place(own, mesh, "data", None, *placed)
    return _place(_sum(slices).astype(param.dtype), mesh, *placed)


def _sum(slices: jax.Array) -> jax.Array:
    """The float32 sum over the two leading axes, as a product with ones.

    The matrix units add up at the memory's speed, a plain sum at a quarter of it. Eight rows of ones, because a
    product with one row would be made a plain sum again.
    """
    ones = jnp.ones((8, *slices.shape[:2]), slices.dtype)
    precision = jax.lax.Precision.HIGHEST if slices.dtype == jnp.float32 else None
    return jnp.einsum(
        "SXY,XY...->S...", ones, slices, precision=precision, preferred_element_type=jnp.float32
    )[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def whole_stream(x: jax.Array, mesh: Mesh | None) -> jax.Array:
    """Activations [B, T, D] between the products, cut over `tensor` by positions, for a product that reads them all.

    Their gradient is cut again: of the parts that the products leave on each device of `tensor` only a slice of the sum
    is needed, so that they are reduced by a reduce-scatter (Korthikanti et al. 2022).
    """
    return constrain(x, mesh, "batch", "length", "width")


whole_stream.defvjp(
    lambda x, mesh: (constrain(x, mesh, "batch", "length", "width"), None),
    lambda mesh, _, upstream: (constrain(upstream, mesh, "batch", "stream", "width"),),
)


def _place(array: jax.Array, mesh: Mesh, *entries) -> jax.Array:
    return jax.lax.with_sharding_constraint(array, NamedSharding(mesh, PartitionSpec(*entries)))


_with_own_gradient.defvjp(_forward, _backward)
