"""TPU slices by the names under which they are rented, the speeds of their chips, and their described devices.

The chips of a slice form a torus of two axes (v5e, v6e) or three (v4, v5p, tpu7x). The number in a name counts
TensorCores on v4, v5p and tpu7x, which have two per chip, and chips on v5e and v6e.
Sources: https://cloud.google.com/tpu/docs, the page of each generation.
"""

import dataclasses
import importlib.util
import math
import os
import re

import jax

from lemur_jax.common.errors import UserError

# What libtpu needs to describe a slice on a machine without a TPU.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",  # do not look for a cloud metadata server
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # otherwise a second process fails on a lock file
    "TPU_ACCELERATOR_TYPE": "v4-8",  # this and the next only silence messages at start
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
}
_GIB = 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generation:
    """One TPU generation; rates and sizes are those of one JAX device.

    Attributes:
      libtpu, chip_config: libtpu's names; "megacore" makes the two cores of a chip one device.
      cores_named: cores per chip that a slice's name counts.
      shapes: sizes that are sold, in chips along each torus axis.
      clock: cycles per second of the compiler's cycle counts: peak FLOP/s over FLOPs per cycle of the matrix units.
      link: bytes per second of one link in one direction: the published bandwidth less a tenth of overhead.
      dcn: bytes per second between slices: a device's share of the host's network cards (assumed).
      host: bytes per second between the device and its host's memory (assumed: four fifths of PCIe 3.0 x16).
      hbm: bytes that a program may use, as the compiler reports.
      bandwidth: bytes per second between the HBM and the device, as published.
    """

    name: str
    device_kind: str
    libtpu: str
    chip_config: str
    cores_named: int
    shapes: tuple[tuple[int, ...], ...]
    devices_per_chip: int = 1
    clock: float
    link: float
    dcn: float
    host: float = 12e9
    hbm: int
    bandwidth: float


def _shapes(text: str) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(int(size) for size in shape.split("x")) for shape in text.split())


_CUBES = "2x2x1 2x2x2 2x2x4 2x4x4 4x4x4 4x4x8 4x4x12 4x8x8 8x8x8"
_PLANES = _shapes("1x1 2x2 2x4 4x4 4x8 8x8 8x16 16x16")

GENERATIONS: dict[str, Generation] = {
    generation.name: generation
    for generation in (
        Generation(
            name="v4", device_kind="TPU v4", libtpu="v4", chip_config="megacore", cores_named=2,
            shapes=_shapes(f"{_CUBES} 8x8x12 8x8x16 8x16x16 16x16x16"),
            clock=1.05e9, link=45e9, dcn=6.25e9, hbm=int(30.75 * _GIB), bandwidth=1228e9,
        ),
        Generation(
            name="v5e", device_kind="TPU v5 lite", libtpu="v5e", chip_config="default", cores_named=1,
            shapes=_PLANES, clock=1.5e9, link=45e9, dcn=3.125e9, hbm=int(15.75 * _GIB), bandwidth=819e9,
        ),
        Generation(
            name="v5p", device_kind="TPU v5", libtpu="v5", chip_config="megacore", cores_named=2,
            shapes=_shapes(f"{_CUBES} 8x8x12 8x8x16 8x12x16 8x16x16 12x16x16 16x16x16 16x16x24"),
            clock=1.75e9, link=90e9, dcn=6.25e9, hbm=int(95.74 * _GIB), bandwidth=2765e9,
        ),
        Generation(
            name="v6e", device_kind="TPU v6 lite", libtpu="v6e", chip_config="default", cores_named=1,
            shapes=_PLANES, clock=1.75e9, link=90e9, dcn=12.5e9, hbm=int(31.24 * _GIB), bandwidth=1638e9,
        ),
        Generation(
            name="tpu7x", device_kind="TPU7x", libtpu="tpu7x", chip_config="default", cores_named=2,
            devices_per_chip=2, shapes=_shapes(f"{_CUBES} 8x8x16 8x16x16 16x16x16"),
            clock=2.2e9, link=90e9, dcn=12.5e9, hbm=int(94.74 * _GIB), bandwidth=3690e9,
        ),
    )
}  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Slice:
    """One or several equal slices, joined by the data-centre network.

    Attributes:
      shape: chips along each torus axis of one slice.
      wrap: which axes are closed to a ring.
    """

    name: str
    generation: Generation
    shape: tuple[int, ...]
    wrap: tuple[bool, ...]
    slices: int = 1

    @property
    def chips(self) -> int:
        return math.prod(self.shape) * self.slices

    @property
    def devices(self) -> int:
        return self.chips * self.generation.devices_per_chip


def slice_names() -> list[str]:
    """Every slice name, smallest first in each generation."""
    return [
        f"{generation.name}-{math.prod(shape) * generation.cores_named}"
        for generation in GENERATIONS.values()
        for shape in generation.shapes
    ]


def find_slice(name: str, slices: int = 1) -> Slice:
    """The slice of that name, or of that shape in chips: "v5p-128" and "v5p-4x4x4" are the same.

    v4, v5p and tpu7x are also built as any box whose sides are multiples of 4.

    Raises:
      UserError: there is no such slice, or `slices` is below 1.
    """
    if slices < 1:
        raise UserError(f"--slices is {slices}: it must be at least 1")
    name = re.sub("^v5litepod-", "v5e-", name.strip().lower())  # gcloud's name of v5e
    kind, _, size = name.partition("-")
    generation = GENERATIONS.get(kind)
    shapes = {}
    if generation:
        shapes = {str(math.prod(shape) * generation.cores_named): shape for shape in generation.shapes}
        shapes |= {"x".join(map(str, shape)): shape for shape in generation.shapes}
        if re.fullmatch("[1-9][0-9]?(x[1-9][0-9]?){2}", size):
            sides = tuple(sorted(int(side) for side in size.split("x")))
            if generation.shapes[0] != (1, 1) and all(side % 4 == 0 for side in sides):
                shapes[size] = sides
    if generation is None or size not in shapes:
        suggestions = [each for each in slice_names() if each.startswith(f"{kind}-")] or slice_names()
        raise UserError(
            f"unknown TPU slice {name!r}: write one of {', '.join(suggestions)}, or its shape in chips, e.g. v5p-4x4x4"
        )
    shape = shapes[size]
    if len(shape) == 2:
        wrap = tuple(length == 16 for length in shape)
    else:  # all axes are rings from 4x4x4 up
        wrap = (all(length % 4 == 0 for length in shape),) * 3
    return Slice(name=name, generation=generation, shape=shape, wrap=wrap, slices=slices)


def described_devices(tpu: Slice) -> list[jax.Device]:
    """Devices for which programs can be compiled, but on which none can run.

    Raises:
      UserError: libtpu is not installed.
    """
    from jax.experimental import topologies

    for key, value in _ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    try:
        topology = topologies.get_topology_desc(
            f"{tpu.generation.libtpu}:{'x'.join(str(size) for size in tpu.shape)}",
            platform="tpu",
            chip_config_name=tpu.generation.chip_config,
            chips_per_host_bounds=(1, 1, 1) if math.prod(tpu.shape) < 4 else (2, 2, 1),
            num_slices=tpu.slices,
            wrap=(*tpu.wrap, False)[:3],
        )
    except RuntimeError as error:
        if importlib.util.find_spec("libtpu") is None:
            raise UserError(
                "planning needs the TPU compiler libtpu (Linux on x86_64): python -m pip install libtpu"
            ) from error
        raise
    return list(topology.devices)
