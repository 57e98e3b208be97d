"""Compiles programs for described TPU devices, and says whether they fit."""

import contextlib
import dataclasses
import functools
import logging
import math
import pathlib
import re
import tempfile
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax

from lemur_jax.common.errors import UserError
from lemur_jax.plan.hlo import Module, parse

logger = logging.getLogger(__name__)
# Seconds between two lines of progress.
_PROGRESS = 10.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compiled:
    """The result of a compilation.

    Attributes:
      fits: whether the compiler could allocate the program's memory.
      seconds: of lowering and compiling on this machine.
      hlo: optimized, scheduled HLO text; "" if the program does not fit.
      peak_bytes: most HBM in use on a device, arguments included; the requested HBM if the program does not fit.
      host_bytes: host memory per device.
      verdict: the compiler's message; "" if the program fits.
      largest: the largest buffers as (bytes, description), if the compiler names them.
    """

    fits: bool
    seconds: float
    hlo: str = ""
    peak_bytes: int = 0
    host_bytes: int = 0
    verdict: str = ""
    largest: tuple[tuple[int, str], ...] = ()

    @functools.cached_property
    def module(self) -> Module | None:
        """The parsed HLO."""
        return parse(self.hlo) if self.hlo else None


def compile_program(function: jax.stages.Wrapped, *arguments: Any, what: str, **static) -> Compiled:
    """Compiles a jitted function for the devices of its arguments' shardings.

    Args:
      arguments: trees of ShapeDtypeStructs with shardings.
      what: name of the program for the log.

    Raises:
      UserError: the compiler does not know one of the function's compiler options, or its value.
    """
    start = time.monotonic()
    with _progress(what), tempfile.TemporaryDirectory() as dumps:
        lowered = function.lower(*arguments, **static)
        # `compiled.as_text()` cannot write programs that use SparseCores (v5p, v6e; libtpu 0.0.52:
        # "async-update instruction should have 1 operands"); the compiler's own dump can.
        try:
            compiled = lowered.compile(compiler_options={"xla_dump_to": dumps, "xla_dump_hlo_as_text": True})
        except jax.errors.JaxRuntimeError as error:
            if match := re.search(r"(No such compile option: |Failed to parse ).*", str(error)):
                raise UserError(f"{match[0].rstrip(' :')}: correct config.compute.compiler_options") from None
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            return out_of_memory(str(error), time.monotonic() - start)
        dump_files = list(pathlib.Path(dumps).glob("*.after_codegen.txt"))
        text = dump_files[0].read_text() if dump_files else compiled.as_text()
    memory = compiled.memory_analysis()
    host = memory.host_temp_size_in_bytes + memory.host_argument_size_in_bytes
    peak = memory.peak_memory_in_bytes
    if host:  # the peak then includes host memory; this is an upper bound of the HBM
        peak = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    return Compiled(fits=True, seconds=time.monotonic() - start, hlo=text, peak_bytes=peak, host_bytes=host)


@contextlib.contextmanager
def _progress(what: str) -> Iterator[None]:
    """Logs that a compilation runs: at once, and every few seconds."""
    logger.info("compiling %s; large models take minutes", what)
    done, start = threading.Event(), time.monotonic()

    def log() -> None:
        while not done.wait(_PROGRESS):
            logger.info("still compiling %s, %.0f s", what, time.monotonic() - start)

    threading.Thread(target=log, daemon=True).start()
    try:
        yield
    finally:
        done.set()


def out_of_memory(message: str, seconds: float) -> Compiled:
    """Reads the compiler's refusal.

    Far above the limit it states two sizes, "(53.65G) exceeds available HBM (30.75G)"; near it, a report with
    "Used 33.1G of 30.7G hbm" and the largest allocations, "1. Size: 4.00G / Operator: op_name=... / Shape: ...". A
    shortage of vector memory ("of 16.00M vmem") is not one of HBM: `peak_bytes` is then 0.
    """
    used = re.search(r"Used ([\d.]+[KMGT]?) of [\d.]+[KMGT]? hbm|temporaries \(([\d.]+[KMGT]?)\)", message)
    largest = []
    for size, entry in re.findall(r"\n\s*\d+\. Size: ([\d.]+[KMGT]?)((?:\n.*\S.*)*)", message):
        shape, origin = re.search(r"Shape: ([^\s{]+)", entry), re.search(r'op_name="([^"]*)"', entry)
        largest.append((_size(size), " ".join(part[1] for part in (shape, origin) if part)))
    return Compiled(
        fits=False,
        seconds=seconds,
        peak_bytes=_size(used[1] or used[2]) if used else 0,
        verdict=message,
        largest=tuple(largest),
    )


def _size(text: str) -> int:
    """Bytes of a size written as 12.34G."""
    unit = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}.get(text[-1], 1)
    return int(float(text.rstrip("KMGT")) * unit)


def device_bytes(tree: Any) -> int:
    """Bytes per device of a tree of ShapeDtypeStructs with shardings."""
    return sum(
        leaf.dtype.itemsize * math.prod(leaf.sharding.shard_shape(leaf.shape))
        for leaf in jax.tree.leaves(tree)
    )
