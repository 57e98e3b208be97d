"""Compiles the train step for a slice that is only described, and says whether it fits."""

import dataclasses
import re
import time
from collections.abc import Mapping
from typing import Any

import jax
from ml_collections import ConfigDict

from lemur_jax.parallel.mesh import make_mesh
from lemur_jax.plan import topologies
from lemur_jax.train.step import Program, build

Options = Mapping[str, bool | int | str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compiled:
    """What the compiler said.

    Attributes:
      fits: whether the program was given memory.
      seconds: that lowering and compiling took here.
      hlo: optimized, scheduled HLO text; "" where it does not fit.
      peak_bytes: most HBM in use on a device, arguments included; where it does not fit, what it asked for.
      host_bytes: host memory a device, for what is kept there.
      verdict: the compiler's message, "" where it fits.
      largest: the largest buffers as (bytes, description), where the compiler names them.
    """

    fits: bool
    seconds: float
    hlo: str = ""
    peak_bytes: int = 0
    host_bytes: int = 0
    verdict: str = ""
    largest: tuple[tuple[int, str], ...] = ()


def program(config: ConfigDict, tpu: topologies.Slice) -> Program:
    """The program of a config over the described slice.

    Raises:
      UserError: libtpu is missing, or the mesh does not divide the model or the batch.
    """
    mesh = make_mesh(config.mesh, topologies.devices(tpu))
    return build(config, mesh, num_sources=max(1, len(config.data.sources)))


def compile_step(program: Program, options: Options | None = None) -> Compiled:
    """Compiles `program.step` as `lemur train` would.

    Args:
      program: over described TPU devices.
      options: compiler options beyond those of parallel/compiler_flags.py.
    """
    start = time.monotonic()
    lowered = program.step.lower(program.state, program.batch)
    try:
        compiled = lowered.compile(compiler_options=dict(options or {}))
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return out_of_memory(str(error), time.monotonic() - start)
    memory = compiled.memory_analysis()
    host = memory.host_temp_size_in_bytes + memory.host_argument_size_in_bytes
    peak = memory.peak_memory_in_bytes
    if host:  # The peak then counts the host's memory too; what the device needs is at most this.
        peak = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    return Compiled(
        fits=True,
        seconds=time.monotonic() - start,
        hlo=compiled.as_text(),
        peak_bytes=peak,
        host_bytes=host,
    )


def out_of_memory(message: str, seconds: float) -> Compiled:
    """Reads the compiler's refusal."""
    return Compiled(
        fits=False,
        seconds=seconds,
        verdict=message,
        peak_bytes=max([0, *_sizes(message)]),
    )


_UNITS = {"B": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def _sizes(text: str) -> list[int]:
    """Every size written as 12.34G."""
    return [
        int(float(number) * _UNITS[unit]) for number, unit in re.findall(r"(\d+(?:\.\d+)?)([KMGT])\b", text)
    ]


def device_bytes(tree: Any) -> int:
    """Bytes a device of a tree of ShapeDtypeStructs with shardings."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        size = leaf.dtype.itemsize
        for length in leaf.sharding.shard_shape(leaf.shape):
            size *= length
        total += size
    return total
