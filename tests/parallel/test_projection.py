"""The product with its own gradient against plain autodiff, whole and cut over meshes."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from lemur_jax.parallel.projection import (
    ROUNDINGS,
    Product,
    Reduction,
    einsum,
    gather_sequence,
    sharded_products,
)
from lemur_jax.parallel.rules import spec
from tests.helpers.sessions import mesh_of

CASES = [
    ("BTD,DF->BTF", ("embed", "mlp"), (16, 32), (8, 6, 16)),
    ("BTF,FD->BTD", ("mlp", "embed"), (32, 16), (8, 6, 32)),
    ("BTD,DHN->BTHN", ("embed", "heads", "head_dim"), (16, 4, 8), (8, 6, 16)),
    ("BTHN,HND->BTD", ("heads", "head_dim", "embed"), (4, 8, 16), (8, 6, 4, 8)),
]


def sharded_product(equation, axes, mesh, reduction, x, weight):
    return sharded_products((Product(equation, axes, mesh, reduction),), x, (weight,))[0]


def assert_as_autodiff(cases, x_axes, x_shape, mesh, exchange, gather=lambda x, mesh: x):
    """Products of one input with the weights of `cases`, and all gradients, placed as what they belong to."""
    rng, reduction = np.random.default_rng(0), Reduction("float32", exchange)
    arrays = [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in (x_shape, *(c[2] for c in cases))]
    products = tuple(Product(equation, axes, mesh, reduction) for equation, axes, _ in cases)

    def plain(x, *weights):
        pairs = zip(cases, weights, strict=True)
        return sum(jnp.sum(jnp.sin(einsum(equation, x, weight))) for (equation, *_), weight in pairs)

    def ours(x, *weights):
        return sum(jnp.sum(jnp.sin(y)) for y in sharded_products(products, gather(x, mesh), weights))

    of_all = range(len(arrays))
    expected = jax.value_and_grad(plain, argnums=of_all)(*arrays)
    places = [
        NamedSharding(mesh, spec(mesh, axes, x.shape))
        for axes, x in zip((x_axes, *(c[1] for c in cases)), arrays, strict=True)
    ]
    value, gradients = jax.jit(jax.value_and_grad(ours, argnums=of_all))(*map(jax.device_put, arrays, places))
    np.testing.assert_allclose(value, expected[0], rtol=1e-5)
    for mine, theirs, place in zip(gradients, expected[1], places, strict=True):
        assert mine.sharding.is_equivalent_to(place, mine.ndim)
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize(
    ("mesh", "exchange"),
    [
        ("fsdp=8", True),
        ("data=2,fsdp=2,tensor=2", True),
        ("fsdp=2,sequence=2,tensor=2", True),
        ("data=2,fsdp=2,tensor=2", False),
    ],
)
@pytest.mark.parametrize(("equation", "axes", "weight_shape", "x_shape"), CASES)
def test_same_result_and_gradients_as_autodiff(equation, axes, weight_shape, x_shape, mesh, exchange):
    summed = axes[:-1] if axes[-1] == "embed" else ("width",)
    x_axes = ("batch", "length", *summed)
    assert_as_autodiff([(equation, axes, weight_shape)], x_axes, x_shape, mesh_of(mesh), exchange)


@pytest.mark.parametrize("exchange", [True, False])
def test_products_of_one_input_and_the_stream_between_them(exchange):
    """Two weights read activations that are cut over `tensor` by positions; everything as plain autodiff has it."""
    mesh, stream = mesh_of("fsdp=2,sequence=2,tensor=2"), ("batch", "residual_length", "width")
    assert NamedSharding(mesh, spec(mesh, stream, (4, 8, 16))).shard_shape((4, 8, 16)) == (2, 2, 16)
    cases = [case[:3] for case in (CASES[0], CASES[2])]
    assert_as_autodiff(cases, stream, (4, 8, 16), mesh, exchange, gather_sequence)


def test_the_gradient_travels_by_all_to_all():
    mesh = mesh_of("fsdp=8")
    equation, axes, weight_shape, x_shape = CASES[0]
    placed = NamedSharding(mesh, spec(mesh, axes, weight_shape))
    x = jax.ShapeDtypeStruct(x_shape, jnp.bfloat16, sharding=NamedSharding(mesh, PartitionSpec("fsdp")))
    weight = jax.ShapeDtypeStruct(weight_shape, jnp.float32, sharding=placed)
    gradient = jax.grad(
        lambda w, x: jnp.sum(
            sharded_product(equation, axes, mesh, Reduction("bfloat16", True), x, w).astype(jnp.float32) ** 2
        )
    )
    compiled = jax.jit(gradient, out_shardings=placed).lower(weight, x).compile().as_text()
    assert "all-to-all" in compiled
    assert "all-reduce(" not in compiled


@pytest.mark.parametrize("exchange", [True, False])
@pytest.mark.parametrize("reduce_dtype", ["float32", "bfloat16"])
def test_the_gradient_is_made_and_reduced_in_the_dtype_that_is_asked_for(exchange, reduce_dtype):
    """bfloat16 activations on eight devices: each device's part by the lowered program, the sum by its error."""
    mesh = mesh_of("fsdp=8")
    equation, axes, weight_shape, x_shape = CASES[0]
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(64, *x_shape[1:])), jnp.bfloat16)
    weight, target = jnp.zeros(weight_shape), jnp.asarray(rng.normal(size=(64, 6, 32)), jnp.bfloat16)

    def loss(weight, x):
        out = sharded_product(equation, axes, mesh, Reduction(reduce_dtype, exchange), x, weight)
        return jnp.sum(out.astype(jnp.float32) * target.astype(jnp.float32))

    gradient = jax.jit(jax.grad(loss))
    parts = "1x8x16x32" if exchange else "16x32"
    kind = {"float32": "f32", "bfloat16": "bf16"}[reduce_dtype]
    products = [line for line in gradient.lower(weight, x).as_text().splitlines() if "dot_general" in line]
    assert any(line.rstrip().endswith(f"tensor<{parts}x{kind}>") for line in products), products

    exact = np.einsum("btd,btf->df", np.float64(x), np.float64(target))
    error = np.abs(np.float64(gradient(weight, x)) - exact).max() / np.abs(exact).max()
    assert error < 1e-5 if reduce_dtype == "float32" else 1e-4 < error < 2e-2


# dtype -> (its largest number, what NumPy rounds to it)
ROUNDING = {
    "int8": (127.5, lambda x: np.clip(np.round(x), -128, 127)),  # as Qwix divides
    "float8_e4m3fn": (448.0, lambda x: x.astype(ml_dtypes.float8_e4m3fn).astype(np.float32)),
    "float8_e5m2": (57344.0, lambda x: x.astype(ml_dtypes.float8_e5m2).astype(np.float32)),
}


def rounded(x, letters, kept, dtype):
    """What a factor is rounded to, with one scale for each index of the axes `kept`."""
    largest, nearest = ROUNDING[dtype]
    summed = tuple(axis for axis, letter in enumerate(letters) if letter not in kept)
    scale = np.abs(x).max(axis=summed, keepdims=True).astype(np.float32) / np.float32(largest)
    scale[scale == 0] = 1
    return nearest(np.asarray(x, np.float32) / scale).astype(np.float64) * scale


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize(("equation", "axes", "weight_shape", "x_shape"), CASES)
def test_narrow_products_equal_those_of_rounded_factors(equation, axes, weight_shape, x_shape, rounding):
    forward, backward, per_tensor = ROUNDINGS[rounding]
    rng = np.random.default_rng(0)
    # No negative number is the largest of a row: in int8 that lies between -127 and -128.
    x, weight = (
        np.maximum(rng.normal(size=size), -0.5).astype(np.float32) for size in (x_shape, weight_shape)
    )
    x[0, 0] = 0  # a padded position has no largest magnitude
    x[1, 1] = 1000 * np.abs(x[1, 1])
    inputs, result = equation.split("->")
    left, right = inputs.split(",")

    def product(first, letters, kind, second, others, kind_2, made):
        kept = "" if per_tensor else made
        factors = rounded(first, letters, kept, kind), rounded(second, others, kept, kind_2)
        return np.einsum(f"{letters},{others}->{made}", *factors)

    y = product(x, left, forward, weight, right, forward, result)
    above = np.maximum(np.cos(y), -0.5).astype(np.float32)
    to_x = product(above, result, backward, weight, right, forward, left)
    to_weight = product(x, left, forward, above, result, backward, right)

    def distance(found, expected):
        return np.linalg.norm(found - expected) / np.linalg.norm(expected)

    mesh = mesh_of("data=2,fsdp=2,tensor=2")
    for exchange in (False, True):
        one = Product(equation, axes, mesh, Reduction("float32", exchange), None, rounding)
        found, back = jax.vjp(
            jax.jit(lambda x, w, one=one: sharded_products((one,), x, (w,))[0]),
            jnp.asarray(x),
            jnp.asarray(weight),
        )
        gradients = back(jnp.asarray(above))
        assert distance(found, y) < 1e-5
        assert distance(gradients[0], to_x) < 1e-5
        # In an exchange, each device has its own scales for its part of the sum, unless an array has one.
        assert distance(gradients[1], to_weight) < (0.05 if exchange and not per_tensor else 1e-5)
