"""Compiles the train step for a slice that is only described, and says whether it fits."""

import dataclasses
import pathlib
import re
import tempfile
import time
from collections.abc import Mapping
from typing import Any

import jax

from lemur_jax.config import RunConfig
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
      verdict: the compiler's message, "" where all went well.
      largest: the largest buffers as (bytes, description), where the compiler names them.
    """

    fits: bool
    seconds: float
    hlo: str = ""
    peak_bytes: int = 0
    host_bytes: int = 0
    verdict: str = ""
    largest: tuple[tuple[int, str], ...] = ()


def program(config: RunConfig, tpu: topologies.Slice) -> Program:
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
    return compile_program(program.step, program.state, program.batch, options=options)


def compile_program(
    function: jax.stages.Wrapped, *arguments: Any, options: Options | None = None, **static
) -> Compiled:
    """Compiles a jitted function for the devices of its arguments' shardings.

    Args:
      function: made by `jax.jit`.
      arguments: trees of ShapeDtypeStructs with shardings.
      options: compiler options beyond its own.
      static: static keyword arguments.
    """
    start = time.monotonic()
    lowered = function.lower(*arguments, **static)
    with tempfile.TemporaryDirectory() as dumps:
        # `compiled.as_text()` takes the program through a form that loses what it says of SparseCores (v5p, v6e;
        # libtpu 0.0.52: "async-update instruction should have 1 operands"). The compiler's own dump does not.
        given: dict[str, Any] = {**(options or {}), "xla_dump_to": dumps, "xla_dump_hlo_as_text": True}
        try:
            compiled = lowered.compile(compiler_options=given)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            return out_of_memory(str(error), time.monotonic() - start)
        written = list(pathlib.Path(dumps).glob("*.after_codegen.txt"))
        text = written[0].read_text() if written else compiled.as_text()
    memory = compiled.memory_analysis()
    host = memory.host_temp_size_in_bytes + memory.host_argument_size_in_bytes
    peak = memory.peak_memory_in_bytes
    if host:  # The peak then counts the host's memory too; what the device needs is at most this.
        peak = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    return Compiled(fits=True, seconds=time.monotonic() - start, hlo=text, peak_bytes=peak, host_bytes=host)


def out_of_memory(message: str, seconds: float) -> Compiled:
    """Reads the compiler's refusal.

    Far above the limit it says two sizes alone, "(53.65G) exceeds available HBM (30.75G)"; near it, a report with
    "Used 33.1G of 30.7G hbm" and the largest allocations. What a kernel lacks of vector memory ("of 16.00M vmem") is
    no HBM: 0 bytes then.
    """
    used = re.search(r"Used ([\d.]+[KMGT]?) of [\d.]+[KMGT]? hbm|temporaries \(([\d.]+[KMGT]?)\)", message)
    return Compiled(
        fits=False,
        seconds=seconds,
        verdict=message,
        peak_bytes=_size(used[1] or used[2]) if used else 0,
        largest=tuple(_allocations(message)),
    )


_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def _size(text: str) -> int:
    """Bytes of a size written as 12.34G."""
    unit = _UNITS.get(text[-1], 1)
    return int(float(text.rstrip("KMGTB")) * unit)


def _allocations(message: str) -> list[tuple[int, str]]:
    """(bytes, shape and origin) of each entry "1. Size: 4.00G / Operator: op_name=... / Shape: ..." of the report."""
    found = []
    for entry in re.split(r"\n\s*\d+\. (?=Size: )", message)[1:]:
        size = re.match(r"Size: ([\d.]+[KMGT]?)", entry)
        shape = re.search(r"Shape: ([^\s{]+)", entry)
        origin = re.search(r'op_name="([^"]*)"', entry)
        if size:
            what = " ".join(part[1] for part in (shape, origin) if part)
            found.append((_size(size[1]), what or "unnamed"))
    return found


def device_bytes(tree: Any) -> int:
    """Bytes a device of a tree of ShapeDtypeStructs with shardings."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        size = leaf.dtype.itemsize
        for length in leaf.sharding.shard_shape(leaf.shape):
            size *= length
        total += size
    return total
