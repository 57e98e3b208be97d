"""TPU slices by the names that they are rented under, and their described devices.

A slice's chips stand in a torus of two axes (v5e, v6e) or three (v4, v5p, tpu7x). The number in a name
counts TensorCores on v4, v5p and tpu7x, which have two a chip, and chips on v5e and v6e.
Sources: https://cloud.google.com/tpu/docs, the page of each generation.
"""

import dataclasses
import difflib
import importlib.util
import math
import os
import re

import jax

from lemur_jax.common.errors import UserError

# What libtpu needs to describe a slice on a machine that has none.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",  # do not look for a cloud metadata server
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # else a second process fails on a lock file
    "TPU_ACCELERATOR_TYPE": "v4-8",  # these two only silence start-up noise
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generation:
    """One TPU generation.

    Attributes:
      name: as it is rented.
      libtpu: the platform name of libtpu's topologies.
      chip_config: libtpu's chip configuration; "megacore" makes the two cores of a chip one device.
      cores_named: cores a chip that a slice's name counts.
      shapes: sizes that are sold, in chips along each torus axis.
      devices_per_chip: JAX devices.
    """

    name: str
    libtpu: str
    chip_config: str
    cores_named: int
    shapes: tuple[tuple[int, ...], ...]
    devices_per_chip: int = 1


def _shapes(text: str) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(int(size) for size in shape.split("x")) for shape in text.split())


_CUBES = "2x2x1 2x2x2 2x2x4 2x4x4 4x4x4 4x4x8 4x8x8 8x8x8"
_PLANES = _shapes("1x1 2x2 2x4 4x4 4x8 8x8 8x16 16x16")

GENERATIONS: dict[str, Generation] = {
    generation.name: generation
    for generation in (
        Generation(
            name="v4", libtpu="v4", chip_config="megacore", cores_named=2,
            shapes=_shapes(f"{_CUBES} 8x8x12 8x8x16 8x16x16 16x16x16"),
        ),
        Generation(name="v5e", libtpu="v5e", chip_config="default", cores_named=1, shapes=_PLANES),
        Generation(
            name="v5p", libtpu="v5", chip_config="megacore", cores_named=2,
            shapes=_shapes(f"{_CUBES} 8x8x12 8x8x16 8x12x16 8x16x16 12x16x16 16x16x16 16x16x24"),
        ),
        Generation(name="v6e", libtpu="v6e", chip_config="default", cores_named=1, shapes=_PLANES),
        Generation(
            name="tpu7x", libtpu="tpu7x", chip_config="default", cores_named=2, devices_per_chip=2,
            shapes=_shapes(f"{_CUBES} 8x8x16 8x16x16 16x16x16"),
        ),
    )
}  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Slice:
    """One or several equal slices of one generation.

    Attributes:
      name: as given, e.g. "v4-512".
      generation: of the chips.
      shape: chips along each torus axis of one slice.
      wrap: which axes are closed to a ring.
      slices: joined by the data-centre network.
    """

    name: str
    generation: Generation
    shape: tuple[int, ...]
    wrap: tuple[bool, ...]
    slices: int = 1

    @property
    def chips(self) -> int:
        """Chips of all slices."""
        return math.prod(self.shape) * self.slices

    @property
    def devices_per_slice(self) -> int:
        return math.prod(self.shape) * self.generation.devices_per_chip


def names() -> list[str]:
    """Every slice name, smallest first in each generation."""
    return [
        f"{generation.name}-{math.prod(shape) * generation.cores_named}"
        for generation in GENERATIONS.values()
        for shape in generation.shapes
    ]


def find(name: str, slices: int = 1) -> Slice:
    """The slice of that name.

    Raises:
      UserError: no slice has that name, or `slices` is below 1.
    """
    if slices < 1:
        raise UserError(f"--slices is {slices}: it must be at least 1")
    # gcloud says v5litepod where the rest of the world says v5e.
    name = re.sub("^v5litepod-", "v5e-", name.strip().lower())
    match = re.fullmatch(r"(\w+?)-(\d+)", name)
    generation = GENERATIONS.get(match[1]) if match else None
    for shape in generation.shapes if generation else ():
        if math.prod(shape) * generation.cores_named == int(match[2]):
            return Slice(
                name=name, generation=generation, shape=shape, wrap=_wrap(generation, shape), slices=slices
            )
    raise UserError(f"unknown TPU slice {name!r}; the nearest are {', '.join(_nearest(name))}")


def _nearest(name: str) -> list[str]:
    """Slices of the same generation by size, or else by spelling."""
    kind, _, size = name.strip().lower().partition("-")
    family = [known for known in names() if known.partition("-")[0] == kind]
    if not family:
        return difflib.get_close_matches(name.lower(), names(), n=4, cutoff=0.0)
    if not size.isdigit():
        return family
    wanted = max(int(size), 1)
    by_size = sorted(family, key=lambda known: abs(math.log(int(known.partition("-")[2]) / wanted)))
    return sorted(by_size[:3], key=family.index)


def _wrap(generation: Generation, shape: tuple[int, ...]) -> tuple[bool, ...]:
    """Which torus axes are rings: all from 4x4x4 up; on v5e and v6e only those of length 16."""
    if len(shape) == 2:
        return tuple(size == 16 for size in shape)
    return (all(size % 4 == 0 for size in shape),) * 3


def devices(tpu: Slice) -> list[jax.Device]:
    """Described devices of a slice; nothing can run on them, but programs can be compiled for them.

    Raises:
      UserError: libtpu is not installed.
    """
    from jax.experimental import topologies

    for key, value in _ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    generation = tpu.generation
    flat = len(tpu.shape) == 2
    small = math.prod(tpu.shape) < 4
    try:
        described = topologies.get_topology_desc(
            f"{generation.libtpu}:{'x'.join(str(size) for size in tpu.shape)}",
            platform="tpu",
            chip_config_name=generation.chip_config,
            chips_per_host_bounds=(1, 1, 1) if small else (2, 2, 1),
            num_slices=tpu.slices,
            wrap=(*tpu.wrap, False) if flat else tpu.wrap,
        )
    except RuntimeError as error:
        if importlib.util.find_spec("libtpu") is None:
            raise UserError(
                'planning needs the TPU compiler: python -m pip install "lemur_jax[plan]" (libtpu, about 300 MB)'
            ) from error
        raise
    return list(described.devices)
