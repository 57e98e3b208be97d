"""Products of activations with sharded weights, and the gradients of those weights.

Axis legend: B batch, T position, D model, F mlp, V vocabulary, R rank, X devices of `data`, Y devices of `fsdp`.

The model's modules call `Projection`: it gathers activations and weights before a product, shards the result, and
contains everything that depends on the platform. The gradient of a weight is written by hand for two reasons:

- The collective on TPU. XLA:TPU reduces the gradient of a weight over `fsdp` by a synchronous all-reduce of the whole
  matrix and then discards all but one slice: 5 to 10% of a 70B step on a v4-512. In an *exchange* each device sends
  every slice of its partial gradient to the device that owns the slice, which sums what it receives in float32. An
  exchange moves more bytes, but it overlaps with computation, and bfloat16 is rounded once instead of at every hop.
- The order of factors elsewhere. XLA:CPU copies the left factor of a product that sums over its rows, so the smaller
  factor goes there (autodiff puts the gradient of the logits there); a barrier keeps XLA from swapping them back.
  Float32 gradients of logits are cast to the activations' dtype to stay on a GPU's fast path.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lemur_jax.parallel.adapted import Adapted, num_inputs
from lemur_jax.parallel.compiler_flags import exchanges_gradients
from lemur_jax.parallel.lookup import look_up
from lemur_jax.parallel.mesh import platform
from lemur_jax.parallel.rules import RULES, constrain, spec


class Rounding(NamedTuple):
    """How the factors of a product are rounded to 8 bits."""

    dtype: str  # of activations and weights
    gradient_dtype: str  # of gradients that come from above
    per_tensor: bool = False  # one scale per array; False: one per index of the axes that the result keeps


# By `config.compute.product_dtype`.
ROUNDINGS = {
    "int8": Rounding("int8", "int8"),
    "float8": Rounding("float8_e4m3fn", "float8_e5m2"),
    "float8_per_tensor": Rounding("float8_e4m3fn", "float8_e5m2", per_tensor=True),
}


class Reduction(NamedTuple):
    """How the gradient of a weight is summed over devices."""

    dtype: str  # of the partial gradients that travel
    exchange: bool  # by an all-to-all and a local float32 sum; False: by the collective that XLA chooses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Projection:
    """Multiplies activations with the weights of a model on a mesh.

    A weight is an `nnx.Param` with its logical axes (`parallel/rules.py`) in `axes`. Between products the residual
    stream [B, T, D] is sharded by positions over `tensor` too (sequence parallelism, Korthikanti et al. 2022).
    """

    dtype: str = "float32"  # of activations and products
    reduce_dtype: str = ""  # of weight gradients in transit; "": `dtype`
    product_dtype: str = ""  # a name in `ROUNDINGS`, for `read` and `write` on a mesh; "": `dtype`
    mesh: Mesh | None = None  # None: no sharding
    compiler_options: tuple[str, ...] = ()  # may choose how gradients are reduced
    frozen: bool = False  # weights have no gradient; only what is `Adapted` beside them has one

    def read(self, x: jax.Array, *products: tuple[str, nnx.Param]) -> tuple[jax.Array, ...]:
        """Products of the residual stream with weights.

        Weights that read the same `x` belong in one call: their contributions to the gradient of `x` are then summed on
        each device before they travel.

        Args:
          x: [B, T, D].
          products: (einsum, weight) pairs, e.g. ("BTD,DF->BTF", gate).
        """
        return self._products(self.gather(x), products, self._reduction(), rounding=self.product_dtype)

    def write(self, equation: str, x: jax.Array, weight: nnx.Param) -> jax.Array:
        """A product whose result [B, T, D] is added to the residual stream."""
        (y,) = self._products(x, [(equation, weight)], self._reduction(), rounding=self.product_dtype)
        return constrain(y, self.mesh, "batch", "residual_length", "width")

    def embed(self, tokens: jax.Array, table: nnx.Param) -> jax.Array:
        """Rows of a table [V, D] for int32 tokens [B, T]: the residual stream [B, T, D]."""
        # Cast after the lookup: the gradient is reduced in the dtype that the lookup reads.
        rows = gather_weight(table.get_value(), table.axes, self.mesh, self.reduce_dtype or self.dtype)
        x = look_up(rows, len(rows), tokens, self.mesh).astype(self.dtype)
        return constrain(x, self.mesh, "batch", "residual_length", "width")

    def route(self, x: jax.Array, router: nnx.Param) -> jax.Array:
        """Float32 [B, T, E] for x [B, T, D], gathered, and a router [D, E]."""
        (y,) = self._products(x, [("BTD,DE->BTE", router)], self._reduction(), "float32")
        return self.shard(y, "width")

    def logits(self, equation: str, hidden: jax.Array, head: nnx.Param) -> jax.Array:
        """The product with the head, in float32: [B, T, D] -> [B, T, V].

        Its gradient is never exchanged, because it is reduced once a step and not once a layer.
        """
        reduction = self._reduction(exchange=False)
        (y,) = self._products(hidden, [(equation, head)], reduction, "float32")
        return self.shard(y, "vocab")

    def shard(self, x: jax.Array, *axes: str) -> jax.Array:
        """Places [B, T, ...], whose dimensions after B and T have these logical axes."""
        return constrain(x, self.mesh, "batch", "length", *axes)

    def gather(self, x: jax.Array) -> jax.Array:
        """The residual stream [B, T, D] with positions gathered over `tensor`, for products that read them all."""
        if self.on_tpu:  # Otherwise XLA:TPU computes the norm again inside each product, tile by tile.
            x = jax.lax.optimization_barrier(x)
        return gather_sequence(x, self.mesh)

    def pointwise(self, function: Callable, *arrays: jax.Array) -> jax.Array:
        """An elementwise function or a norm.

        Off TPU the backward pass computes it again: autodiff keeps several arrays for one norm or one SiLU, and a CPU
        takes longer to write and read them. On TPU the rematerialization policy alone decides.
        """
        # prevent_cse=False: as in models/remat.py
        return (function if self.on_tpu else jax.checkpoint(function, prevent_cse=False))(*arrays)

    @property
    def on_tpu(self) -> bool:
        return self.mesh is not None and platform(self.mesh) == "tpu"

    def _reduction(self, exchange: bool = True) -> Reduction | None:
        """How weight gradients are reduced; None: as autodiff and XLA do."""
        if self.mesh is None or self.frozen:
            return None
        dtype = self.reduce_dtype or self.dtype
        kind = self.mesh.devices.flat[0].device_kind
        exchange = exchange and _fsdp_ways(self.mesh) > 1 and exchanges_gradients(kind, self.compiler_options)
        by_hand = exchange or dtype != self.dtype or bool(self.product_dtype) or not self.on_tpu
        return Reduction(dtype, exchange) if by_hand else None

    def _products(self, x, products, reduction: Reduction | None, dtype=None, rounding: str = ""):
        rounding = rounding if reduction else ""  # rounding has no gradient but the one written here
        einsums = tuple(
            Product(equation, tuple(weight.axes), self.mesh, reduction, dtype, rounding)
            for equation, weight in products
        )
        values = tuple(weight.get_value() for _, weight in products)
        weights = tuple(value.base if isinstance(value, Adapted) else value for value in values)
        if reduction is None or any(map(is_quantized, weights)):  # integers have no gradient
            results = tuple(product(x, weight) for product, weight in zip(einsums, weights, strict=True))
        else:
            results = sharded_products(einsums, x, weights)
        return tuple(
            y + product.low_rank(x, value) if isinstance(value, Adapted) else y
            for product, value, y in zip(einsums, values, results, strict=True)
        )


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def gather_sequence(x: jax.Array, mesh: Mesh | None) -> jax.Array:
    """Activations [B, T, D] with positions gathered over `tensor`; their gradient is sharded over it again.

    So the parts of the gradient that the products leave on each device are reduced by a reduce-scatter.
    """
    return constrain(x, mesh, "batch", "length", "width")


gather_sequence.defvjp(
    lambda x, mesh: (constrain(x, mesh, "batch", "length", "width"), None),
    lambda mesh, _, upstream: (constrain(upstream, mesh, "batch", "residual_length", "width"),),
)


def _fsdp_ways(mesh: Mesh) -> int:
    """Devices that share a weight."""
    return mesh.shape["fsdp"] * mesh.shape["expert"]


def is_quantized(weight: Any) -> bool:
    """Whether this is a `qwix.QArray` (integers and scales) and not an array; does not import qwix."""
    return hasattr(weight, "qvalue")


def gather_weight(weight: Any, axes: tuple[str, ...], mesh: Mesh | None, dtype) -> jax.Array:
    """The weight in `dtype`, gathered over `fsdp`; of a `qwix.QArray` (`infer/quantize.py`) the integers travel."""
    gathered = _gather(weight.astype(dtype), axes, mesh)
    if not is_quantized(weight):
        return gathered
    import qwix

    return qwix.dequantize(gathered)


def _gather(weight: Any, axes: tuple[str, ...], mesh: Mesh | None) -> Any:
    """An array or a `qwix.QArray`, gathered over `fsdp`.

    It is cast before, so that fewer bytes travel; the constraint makes the partitioner gather weights instead of
    reducing activations.
    """
    gathered_axes = tuple("width" if axis in ("embed", "expert_embed") else axis for axis in axes)
    return jax.tree.map(lambda array: constrain(array, mesh, *scale_axes(gathered_axes, array.shape)), weight)


def rounded_factor(x: jax.Array, letters: str, kept: str, dtype: str) -> Any:
    """A factor of an einsum, rounded to 8 bits: a `qwix.QArray` of `x`'s shape.

    Each index of the axes `kept` has a scale, by the largest magnitude over the other axes.

    Args:
      letters: the einsum's letters of `x`, one an axis.
      kept: letters of the result, or "" for one scale.
      dtype: "int8", "float8_e4m3fn" or "float8_e5m2".
    """
    import qwix

    channels = [axis for axis, letter in enumerate(letters) if letter in kept]
    return qwix.quantize(x, dtype, channelwise_axes=channels, scale_dtype="float32")


def scale_axes(axes: tuple[str, ...], shape: tuple[int, ...]) -> tuple[str, ...]:
    """The logical axes of a quantized matrix as those of its scales, which have size 1 along summed axes."""
    return tuple("width" if size == 1 else axis for axis, size in zip(axes, shape, strict=True))


def einsum(equation: str, *factors: Any, dtype: Any = None) -> jax.Array:
    """An einsum in its inputs' dtype, or in `dtype`; accelerators do not round float32 inputs to bfloat16."""
    if is_quantized(factors[0]):
        import qwix

        return qwix.einsum(equation, *factors).astype(dtype)
    precision = jax.lax.Precision.HIGHEST if factors[0].dtype == jnp.float32 else None
    return jnp.einsum(equation, *factors, precision=precision, preferred_element_type=dtype)


@dataclasses.dataclass(frozen=True)
class Product:
    """An einsum of activations with a weight, and its gradients; `data` × `fsdp` must divide B."""

    equation: str  # with B first in the activations and in the result, e.g. "BTD,DF->BTF"
    axes: tuple[str, ...]  # logical axes of the weight, one of them "embed"
    mesh: Mesh | None
    reduction: Reduction | None  # of the weight's gradient; None: not needed
    dtype: str | None = None  # of the result; None: that of the activations
    rounding: str = ""  # a name in `ROUNDINGS`: both factors of each product are rounded

    def __call__(self, x: jax.Array, weight: Any) -> jax.Array:
        left, _, result = self._letters()
        return self._times_weight(x, left, result, weight, self.dtype)

    def _times_weight(
        self, x: jax.Array, letters: str, result: str, weight: Any, dtype: str | None, kind: int = 0
    ) -> jax.Array:
        """The product of an array with the gathered weight.

        Args:
          letters, result: the einsum's letters of `x` and of the result.
          kind: 0: `x` are activations; 1: a gradient from above.
        """
        _, right, _ = self._letters()
        equation = f"{letters},{right}->{result}"
        if not self.rounding:
            return einsum(equation, x, gather_weight(weight, self.axes, self.mesh, x.dtype), dtype=dtype)
        dtypes = ROUNDINGS[self.rounding]
        kept = "" if dtypes.per_tensor else result
        rounded = rounded_factor(weight.astype(x.dtype), right, kept, dtypes.dtype)
        factors = rounded_factor(x, letters, kept, dtypes[kind]), _gather(rounded, self.axes, self.mesh)
        return einsum(equation, *factors, dtype=x.dtype)

    def low_rank(self, x: jax.Array, weight: Adapted) -> jax.Array:
        """The product with the update of the weight."""
        left, right, result = self._letters()
        cut = num_inputs(self.axes)
        a, b = (
            gather_weight(leaf, axes, self.mesh, x.dtype)
            for leaf, axes in ((weight.a, (*self.axes[:cut], "rank")), (weight.b, ("rank", *self.axes[cut:])))
        )
        inner = einsum(f"{left},{right[:cut]}R->BTR", weight.drop(x), a)
        return weight.scale * einsum(f"BTR,R{right[cut:]}->{result}", inner, b, dtype=self.dtype)

    def _letters(self) -> tuple[str, str, str]:
        """The einsum's letters for activations, weight and result."""
        inputs, result = self.equation.split("->")
        left, right = inputs.split(",")
        return left, right, result

    def input_gradient(self, upstream: jax.Array, weight: jax.Array) -> jax.Array:
        """The gradient of the activations; the weight is gathered again instead of kept."""
        left, _, result = self._letters()
        return self._times_weight(upstream, result, left, weight, None, kind=1)

    def weight_gradient(self, x: jax.Array, upstream: jax.Array, weight: jax.Array) -> jax.Array:
        """The gradient of the weight, sharded like the weight."""
        assert self.mesh is not None
        assert self.reduction is not None
        target = spec(self.mesh, self.axes, weight.shape)
        dtype, exchange = self.reduction
        if exchange:
            return self._place(self._exchange(x, upstream, dtype, target).astype(weight.dtype), *target)
        return self._place(self._reduce(x, upstream, dtype), *target).astype(weight.dtype)

    def _reduce(self, x: jax.Array, upstream: jax.Array, dtype: str) -> jax.Array:
        left, right, result = self._letters()
        if self.rounding:
            return self._outer(left, x, result, upstream, right, dtype)
        factors = sorted([(x, left), (upstream, result)], key=lambda factor: factor[0].size)
        (small, first), (large, second) = factors
        letters = right
        if platform(self.mesh) == "cpu":
            letters = "".join(sorted(right, key=lambda axis: axis in second))
        gradient = einsum(f"{first},{second}->{letters}", small, large, dtype=dtype)
        if letters != right:
            gradient = jnp.einsum(f"{letters}->{right}", jax.lax.optimization_barrier(gradient))
        return gradient

    def _exchange(self, x: jax.Array, upstream: jax.Array, dtype: str, target: PartitionSpec) -> jax.Array:
        left, right, result = self._letters()

        def by_device(array):  # [B, ...] -> [X, Y, B / XY, ...]
            return array.reshape(self.mesh.shape["data"], _fsdp_ways(self.mesh), -1, *array.shape[1:])

        own = self._outer(f"XY{left}", by_device(x), f"XY{result}", by_device(upstream), f"XY{right}", dtype)
        entries = (None if axis == "embed" else entry for axis, entry in zip(self.axes, target, strict=True))
        own = self._place(own, "data", RULES["embed"], *entries)
        return _sum_parts(self._place(own, "data", None, *target))

    def _outer(
        self, left: str, x: jax.Array, above: str, upstream: jax.Array, result: str, dtype: str
    ) -> jax.Array:
        """The product of activations with the gradient of the result, whose positions are summed."""
        factors: tuple[Any, ...] = x, upstream
        if self.rounding:
            forward, backward, per_tensor = ROUNDINGS[self.rounding]
            kept = "" if per_tensor else result
            factors = rounded_factor(x, left, kept, forward), rounded_factor(upstream, above, kept, backward)
        return einsum(f"{left},{above}->{result}", *factors, dtype=dtype)

    def _place(self, array: jax.Array, *entries) -> jax.Array:
        return jax.lax.with_sharding_constraint(array, NamedSharding(self.mesh, PartitionSpec(*entries)))


def _sum_parts(parts: jax.Array) -> jax.Array:
    """The float32 sum over the two leading axes, as a product with ones.

    The matrix units sum at memory speed, a plain reduction at a quarter of it. There are eight rows of ones because XLA
    turns a product with one row back into a reduction.
    """
    ones = jnp.ones((8, *parts.shape[:2]), parts.dtype)
    return einsum("SXY,XY...->S...", ones, parts, dtype="float32")[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def sharded_products(
    products: tuple[Product, ...], x: jax.Array, weights: tuple[jax.Array, ...]
) -> tuple[jax.Array, ...]:
    """Products of the same activations with several weights, whose gradients are reduced as their `reduction` says."""
    return tuple(product(x, weight) for product, weight in zip(products, weights, strict=True))


def _forward(products, x, weights):
    # Not `sharded_products` itself: a policy that keeps products (`dots`) does not see into a custom_vjp function.
    return tuple(product(x, weight) for product, weight in zip(products, weights, strict=True)), (x, weights)


def _backward(products, saved, upstream):
    x, weights = saved
    back, gradients = None, []
    for product, weight, grad in zip(products, weights, upstream, strict=True):
        grad = grad.astype(x.dtype)
        term = product.input_gradient(grad, weight)
        back = term if back is None else back + term
        gradients.append(product.weight_gradient(x, grad, weight))
    if products[0].reduction.exchange:
        # The barrier makes both results available together, so the scheduler overlaps the exchange with the product
        # `back`. Without it, all exchanges of a layer start at the layer's end, where too little work is left.
        back, gradients = jax.lax.optimization_barrier((back, gradients))
    return back, tuple(gradients)


sharded_products.defvjp(_forward, _backward)
