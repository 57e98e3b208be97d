"""Mesh shapes: −1 is the rest, and a mesh that does not fit says so."""

import numpy as np
import pytest

from lemur_jax.common.errors import UserError
from lemur_jax.parallel.mesh import make_mesh, mesh_shape, parse_mesh
from lemur_jax.plan import topologies


def sizes(*values):
    return dict(zip(("data", "fsdp", "sequence", "tensor"), values, strict=True))


@pytest.mark.parametrize(
    ("given", "shape"),
    [
        ((1, -1, 1, 1), (1, 8, 1, 1, 1)),
        ((2, -1, 1, 2), (2, 2, 1, 1, 2)),
        ((-1, 2, 2, 2), (1, 2, 1, 2, 2)),
        ((1, 8, 1, 1), (1, 8, 1, 1, 1)),
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


@pytest.mark.parametrize("data", [2, 4])
def test_slices_lie_along_data(data):
    """Described devices of two slices: only the outermost axis leaves a slice."""
    pytest.importorskip("libtpu", reason="the plan extra (libtpu) is not installed")
    devices = topologies.described_devices(topologies.find_slice("v5e-8", 2))
    mesh = make_mesh(sizes(data, -1, 1, 2), devices)
    assert mesh.devices.shape == (data, 8 // data, 1, 1, 2)
    halves = np.split(mesh.devices, 2)
    assert [{device.slice_index for device in half.flat} for half in halves] == [{0}, {1}]
    # The slices are laid out alike, so a group along `data` joins the same place of each.
    assert [[tuple(device.coords) for device in half.flat] for half in halves] == [
        [tuple(device.coords) for device in halves[0].flat]
    ] * 2
    with pytest.raises(UserError, match=r"data is 1, which must be a multiple of the 2 TPU slices"):
        make_mesh(sizes(1, 16, 1, 1), devices)


@pytest.mark.parametrize(
    ("text", "read"),
    [("", (1, -1, 1, 1)), ("fsdp=4,tensor=2", (1, 4, 1, 2)), (" data = -1 , fsdp = 1,", (-1, 1, 1, 1))],
)
def test_mesh_as_it_is_written(text, read):
    assert parse_mesh(text) == sizes(*read) | {"expert": 1}


@pytest.mark.parametrize(
    "text",
    ["fsdp", "fsdp=", "fspd=2", "fsdp=two", "fsdp=--1", "fsdp=²", "fsdp=4,fsdp=2", "fsdp=" + "9" * 5000],
)
def test_mesh_that_cannot_be_read(text):
    with pytest.raises(UserError, match="cannot read mesh"):
        parse_mesh(text)
