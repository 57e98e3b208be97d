"""The product with its own gradient against plain autodiff, whole and cut over meshes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from lemur_jax.models.linear import Reduction, product, sharded_product
from lemur_jax.parallel.mesh import make_mesh
from lemur_jax.parallel.rules import spec

CASES = [
    ("BTD,DF->BTF", ("embed", "mlp"), (16, 32), (8, 6, 16)),
    ("BTF,FD->BTD", ("mlp", "embed"), (32, 16), (8, 6, 32)),
    ("BTD,DHN->BTHN", ("embed", "heads", "head_dim"), (16, 4, 8), (8, 6, 16)),
    ("BTHN,HND->BTD", ("heads", "head_dim", "embed"), (4, 8, 16), (8, 6, 4, 8)),
]


@pytest.mark.parametrize(
    ("shape", "exchange"),
    [((1, 8, 1, 1), True), ((2, 2, 1, 2), True), ((1, 2, 2, 2), True), ((2, 2, 1, 2), False)],
)
@pytest.mark.parametrize(("equation", "axes", "weight_shape", "x_shape"), CASES)
def test_same_result_and_gradients_as_autodiff(equation, axes, weight_shape, x_shape, shape, exchange):
    mesh = make_mesh(dict(zip(("data", "fsdp", "sequence", "tensor"), shape, strict=True)))
    rng = np.random.default_rng(0)
    x, weight = (jnp.asarray(rng.normal(size=size), jnp.float32) for size in (x_shape, weight_shape))

    def loss(multiply):
        return lambda x, weight: jnp.sum(jnp.sin(multiply(x, weight)))

    plain = jax.value_and_grad(loss(lambda x, w: product(equation, x, w)), argnums=(0, 1))(x, weight)
    reduction = Reduction("float32", exchange)
    placed = NamedSharding(mesh, spec(mesh, axes, weight_shape))
    batch = NamedSharding(mesh, PartitionSpec(("data", "fsdp"), "sequence"))
    ours = jax.jit(
        jax.value_and_grad(
            loss(lambda x, w: sharded_product(equation, axes, mesh, reduction, x, w)), argnums=(0, 1)
        )
    )(jax.device_put(x, batch), jax.device_put(weight, placed))
    assert ours[1][1].sharding.is_equivalent_to(placed, weight.ndim)
    for mine, theirs in zip(jax.tree.leaves(ours), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=2e-5)


def test_the_gradient_travels_by_all_to_all():
    mesh = make_mesh({"data": 1, "fsdp": 8, "sequence": 1, "tensor": 1})
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
