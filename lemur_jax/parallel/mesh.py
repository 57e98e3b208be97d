"""The device mesh: `data × fsdp × expert × sequence × tensor`."""

import math
import re
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh

from lemur_jax.common.errors import UserError
from lemur_jax.parallel.config import MeshConfig

# Outermost first: neighbours in the last axis are neighbours on the interconnect.
AXES = ("data", "fsdp", "expert", "sequence", "tensor")
# Axis of the copies of the parameters in `mesh_of_copies`.
COPY = "copy"


def mesh_shape(
    sizes: MeshConfig | Mapping[str, int], num_devices: int, option: str = "config.mesh"
) -> tuple[int, ...]:
    """Sizes of `AXES`, with −1 replaced by the devices that are left.

    Args:
      sizes: by axis.
      num_devices: their product.
      option: how the user sets the sizes, for messages.

    Raises:
      UserError: the sizes do not multiply to `num_devices`, or `MeshConfig` refuses them.
    """
    sizes = sizes if isinstance(sizes, MeshConfig) else MeshConfig(**sizes)
    shape = [getattr(sizes, axis) for axis in AXES]
    text = " × ".join(f"{axis} {size}" for axis, size in zip(AXES, shape, strict=True))
    fixed = math.prod(size for size in shape if size != -1)
    if -1 in shape and num_devices % fixed == 0:
        shape[shape.index(-1)] = num_devices // fixed
    if math.prod(shape) != num_devices:
        raise UserError(
            f"mesh {text} does not multiply to the {num_devices} devices here:"
            f" set {option} so that it does, or one axis to -1"
        )
    return tuple(shape)


def make_mesh(
    sizes: MeshConfig | Mapping[str, int],
    devices: Sequence[jax.Device] | None = None,
    option: str = "config.mesh",
) -> Mesh:
    """The mesh over all devices of all hosts, or over `devices` (a slice that is only described).

    Several TPU slices are laid along `data`, so that only gradients cross the slow network between them.

    Args:
      sizes: the sizes of `AXES`, e.g. `config.mesh`; one may be −1.
      devices: default `jax.devices()`.
      option: how the user sets the sizes, for messages.

    Raises:
      UserError: sizes that do not fit the devices, or a `data` axis that the slices cannot share.
    """
    devices = list(jax.devices()) if devices is None else list(devices)
    shape = mesh_shape(sizes, len(devices), option)
    slices: dict[int, list[jax.Device]] = {}
    for device in devices:
        slices.setdefault(getattr(device, "slice_index", None) or 0, []).append(device)
    if shape[0] % len(slices):
        raise UserError(
            f"{option}: data is {shape[0]}, which must be a multiple of the {len(slices)} TPU slices, whose"
            " network carries nothing but data parallelism"
        )
    slice_shape = (shape[0] // len(slices), *shape[1:])
    grids = [
        mesh_utils.create_device_mesh(slice_shape, group, allow_split_physical_axes=True)
        for _, group in sorted(slices.items())
    ]
    return Mesh(np.concatenate(grids), AXES)


def mesh_of_copies(mesh: Mesh) -> Mesh:
    """The same devices with `data` renamed to `COPY`, and a `data` axis of size 1.

    In a function that is mapped over the copies of the parameters, sharding rules name no axis of the copies.
    """
    return Mesh(mesh.devices[:, None], (COPY, *AXES))


def platform(mesh: Mesh | None) -> str:
    """The platform of a mesh's devices, real or described, e.g. "tpu"; without a mesh, of the default device."""
    return jax.default_backend() if mesh is None else mesh.devices.flat[0].platform


def parse_mesh(text: str) -> dict[str, int]:
    """`"fsdp=4,tensor=2"` as sizes of `AXES`; axes not named are 1, and `fsdp` is the rest.

    Raises:
      UserError: an unknown axis, one that is named twice, or a size that is no number.
    """
    sizes: dict[str, int] = {}
    for item in filter(None, text.split(",")):
        axis, _, size = (word.strip() for word in item.partition("="))
        if axis not in AXES or axis in sizes or not re.fullmatch(r"-?[0-9]{1,9}", size):
            raise UserError(
                f"cannot read mesh {text!r}: write it as fsdp=4,tensor=2 with axes {', '.join(AXES)}, each at"
                " most once"
            )
        sizes[axis] = int(size)
    return {**dict.fromkeys(AXES, 1), "fsdp": -1} | sizes
