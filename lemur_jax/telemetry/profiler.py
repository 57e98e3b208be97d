"""Profiler traces of chosen steps, for TensorBoard and Perfetto."""

import pathlib
import tempfile
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
from etils import epath

from lemur_jax.common.errors import UserError


def parse_steps(text: str) -> range:
    """`"10:13"` as steps 10, 11 and 12, counted from 0; UserError for another text."""
    first, _, stop = text.partition(":")
    if not (first.isdecimal() and stop.isdecimal() and int(first) < int(stop)):
        raise UserError(f"cannot read --profile {text!r}: write it as 10:13 for steps 10, 11 and 12")
    return range(int(first), int(stop))


def check_steps(steps: range, end: int) -> None:
    """Raises UserError if a run of `end` steps does not make these steps."""
    if steps.stop > end:
        raise UserError(
            f"--profile {steps.start}:{steps.stop} goes beyond config.train.steps {end}: choose steps below it"
        )


def trace_steps(
    batches: Iterable[tuple[int, Any]], steps: range, directory: epath.Path, finish: Callable[[], None]
) -> Iterator[tuple[int, Any]]:
    """Yields the same (step, batch) pairs, and traces from the first to the last of `steps` into `directory`.

    A step lasts until the next pair is requested. No trace is made if the range is empty or begins before the first
    pair. `finish` waits until the devices have finished all dispatched work.
    """
    iterator = iter(batches)
    local: tempfile.TemporaryDirectory | None = None
    try:
        for step, batch in iterator:
            if step == steps.start and steps:
                local = tempfile.TemporaryDirectory()
                jax.profiler.start_trace(local.name)
            with jax.profiler.StepTraceAnnotation("train", step_num=step):
                yield step, batch
            if local and step + 1 == steps.stop:
                finish()
                _save_trace(local, directory)
                local = None
    finally:
        if local:
            _save_trace(local, directory)
        if hasattr(iterator, "close"):
            iterator.close()


def _save_trace(local: tempfile.TemporaryDirectory, directory: epath.Path) -> None:
    """Ends the trace and copies it to `directory`, which the profiler itself could not write if it is on gs://."""
    jax.profiler.stop_trace()
    with local as name:
        for source in filter(pathlib.Path.is_file, pathlib.Path(name).rglob("*")):
            target = directory / source.relative_to(name).as_posix()
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(source.read_bytes())
