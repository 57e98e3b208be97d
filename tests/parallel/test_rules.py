"""The sharding table: every parameter is cut as it says, and nothing falls through."""

import math

import jax
import pytest
from jax.sharding import PartitionSpec

from lemur_jax.common.errors import UserError
from lemur_jax.models.decoder import abstract_params, logical_axes
from lemur_jax.models.presets import preset
from lemur_jax.parallel.rules import param_shardings, spec
from tests.helpers.sessions import mesh_of


def test_every_matrix_is_cut_over_fsdp_and_tensor():
    config = preset("tiny")
    abstract = abstract_params(config)
    shardings = param_shardings(mesh_of("fsdp=4,tensor=2"), abstract, logical_axes(config))
    for leaf, sharding in zip(jax.tree.leaves(abstract), jax.tree.leaves(shardings), strict=True):
        ways = leaf.size // math.prod(sharding.shard_shape(leaf.shape))
        # Norm scales are whole everywhere, matrices are cut over all eight devices.
        assert ways == (8 if leaf.size > 1000 else 1)


def test_axis_without_a_rule_is_an_error_that_names_the_leaf():
    with pytest.raises(UserError, match=r"layers/mixer.*'state'"):
        spec(mesh_of("fsdp=8"), ("state", "embed"), (4, 64), "layers/mixer")


def test_heads_that_tensor_does_not_divide():
    config = preset("tiny")  # 2 key-value heads
    with pytest.raises(UserError, match=r"attention/key.*kv_heads.*size 2 is not divisible by 4"):
        param_shardings(mesh_of("fsdp=2,tensor=4"), abstract_params(config), logical_axes(config))


@pytest.mark.parametrize(
    ("axes", "shape", "placed"),
    [
        (
            ("layers", "embed", "heads", "head_dim"),
            (2, 64, 4, 16),
            (None, ("fsdp", "expert"), "tensor", None),
        ),
        (("vocab", "embed"), (32_005, 64), (None, ("fsdp", "expert"))),  # an odd vocabulary stays whole
    ],
)
def test_placement(axes, shape, placed):
    assert spec(mesh_of("fsdp=4,tensor=2"), axes, shape) == PartitionSpec(*placed)


def test_residual_positions_are_cut_over_tensor_where_positions_allow():
    mesh = mesh_of("fsdp=2,sequence=2,tensor=2")
    axes = ("batch", "residual_length", "width")
    assert spec(mesh, axes, (4, 8, 64)) == PartitionSpec(
        ("data", "fsdp", "expert"), ("sequence", "tensor"), None
    )
    assert spec(mesh, axes, (4, 6, 64)) == PartitionSpec(("data", "fsdp", "expert"), "sequence", None)
    assert spec(mesh_of("data=2,fsdp=2,tensor=2"), axes, (4, 1, 64))[1] in ("sequence", None)  # decoding
