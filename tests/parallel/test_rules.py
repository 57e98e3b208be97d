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


BATCH = ("data", "fsdp", "expert")
RESIDUAL = ("batch", "residual_length", "width")


@pytest.mark.parametrize(
    ("mesh", "axes", "shape", "placed"),
    [
        ("fsdp=4,tensor=2", ("layers", "embed", "heads"), (2, 64, 4), (None, ("fsdp", "expert"), "tensor")),
        # An odd vocabulary stays whole.
        ("fsdp=4,tensor=2", ("vocab", "embed"), (32_005, 64), (None, ("fsdp", "expert"))),
        # Positions are cut over `tensor` where it divides them; in decoding there is one.
        ("fsdp=2,sequence=2,tensor=2", RESIDUAL, (4, 8, 64), (BATCH, ("sequence", "tensor"), None)),
        ("fsdp=2,sequence=2,tensor=2", RESIDUAL, (4, 6, 64), (BATCH, "sequence", None)),
        ("data=2,fsdp=2,tensor=2", RESIDUAL, (4, 1, 64), (BATCH, "sequence", None)),
    ],
)
def test_placement(mesh, axes, shape, placed):
    assert spec(mesh_of(mesh), axes, shape) == PartitionSpec(*placed)
