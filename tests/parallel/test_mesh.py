"""Mesh shapes: −1 is the rest, and a mesh that does not fit says so."""

import jax
import pytest

from lemur_jax.common.errors import UserError
from lemur_jax.parallel.mesh import AXES, make_mesh, mesh_shape


def sizes(*values):
    return dict(zip(AXES, values, strict=True))


@pytest.mark.parametrize(
    ("given", "shape"),
    [
        ((1, -1, 1, 1), (1, 8, 1, 1)),
        ((2, -1, 1, 2), (2, 2, 1, 2)),
        ((-1, 2, 2, 2), (1, 2, 2, 2)),
        ((1, 8, 1, 1), (1, 8, 1, 1)),
    ],
)
def test_shape(given, shape):
    assert mesh_shape(sizes(*given), 8) == shape


@pytest.mark.parametrize(
    "given", [(1, 3, 1, 1), (3, -1, 1, 1), (-1, -1, 1, 1), (0, -1, 1, 1), (1, 16, 1, 1), (1, -2, 1, 1)]
)
def test_impossible_mesh_names_its_axes(given):
    with pytest.raises(UserError, match="data .* fsdp .* sequence .* tensor"):
        mesh_shape(sizes(*given), 8)


def test_mesh_holds_every_device_once():
    mesh = make_mesh(sizes(2, -1, 1, 2))
    assert mesh.axis_names == AXES
    assert {d.id for d in mesh.devices.flat} == {d.id for d in jax.devices()}
