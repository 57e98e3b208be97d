"""What is in a checkpoint directory: steps, sizes, ages, which are intact, and how two configs differ."""

import time
from functools import partial
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from lemur_jax.checkpoint.digest import RunningDigest
from lemur_jax.checkpoint.metadata import Damaged, Leaf
from lemur_jax.checkpoint.reading import (
    chunk_slices,
    is_transient,
    open_arrays,
    open_manager,
    read_metadata,
    read_on_all_hosts,
    read_slices,
    restore_metadata,
    steps_in,
)
from lemur_jax.common.errors import UserError
from lemur_jax.common.progress import duration
from lemur_jax.config import differences


def checkpoint_table(path: epath.PathLike) -> tuple[str, bool]:
    """One line per checkpoint, oldest first, and whether all are verified; every byte of each is read.

    Those that a run removes meanwhile are left out. Raises UserError: no checkpoint there.
    """
    directory, steps = steps_in(path)
    lines = [f"{directory}", f"{'step':>10} {'GB':>9} {'age':>12}  state"]
    states = []
    for step in steps:
        state = verify(directory, step)
        try:
            size, newest = _size_and_time(directory / str(step))
        except FileNotFoundError:
            continue
        if not state.startswith("verified") and step not in steps_in(directory)[1]:
            continue  # an active run has removed it since
        states.append(state)
        lines.append(f"{step:>10} {size / 1e9:>9.3f} {duration(max(0.0, time.time() - newest)):>12}  {state}")
    return "\n".join(lines), all(state.startswith("verified") for state in states)


def verify(directory: epath.Path, step: int) -> str:
    """ "verified", or what is wrong, as a restore sees it; one chunk of one array is in memory at a time."""
    try:
        manager = open_manager(directory)
        leaves = restore_metadata(manager, directory, step)["leaves"]
        for item, tree in leaves.items():
            # Restores no array: Orbax only reads the description of the item.
            no_arrays = ocp.args.PyTreeRestore(item={"none": ocp.PLACEHOLDER}, partial_restore=True)
            read_on_all_hosts(
                partial(manager.restore, step, args=ocp.args.Composite(**{item: no_arrays})), item
            )
            arrays = open_arrays(directory, step, tree, item)
            for name, leaf in tree.items():
                if _digest(arrays[name], f"{item}: {name}", leaf) != leaf.digest:
                    raise Damaged(f"{item}: {name} is not what was saved")
    except UserError as error:
        cause = error.__cause__
        damaged = isinstance(error, Damaged) or (cause is not None and not is_transient(cause))
        return f"{'DAMAGED' if damaged else 'NOT VERIFIED'}: {error}"
    return f"verified ({', '.join(leaves)})"


def _digest(array: Any, name: str, leaf: Leaf) -> int:
    if (tuple(array.shape), str(array.dtype.name)) != (leaf.shape, leaf.dtype):
        raise Damaged(f"{name} is not what was saved")
    digest = RunningDigest()
    for block in read_slices(array, chunk_slices(array), name):
        if not np.isfinite(block).all():
            raise Damaged(f"{name} has values that are not finite")
        digest.update(block)
    return digest.value


def config_difference(path: epath.PathLike, old: int, new: int) -> str:
    """The config keys in which two checkpoints differ, with both values.

    Raises UserError: there is no such step, or one was imported and has no config.
    """
    configs = []
    for step in (old, new):
        config = read_metadata(path, step)["config"]
        if config is None:
            raise UserError(f"the checkpoint of step {step} in {path} was imported: it has no run config")
        configs.append(config)
    changes = differences(*configs)
    if not changes:
        return f"the configs of steps {old} and {new} are the same"
    return "\n".join(f"{key}: {before!r} -> {now!r}" for key, (before, now) in changes.items())


def _size_and_time(directory: epath.Path) -> tuple[int, float]:
    """Bytes of all files, and when the newest was written (Unix time)."""
    size, newest = 0, 0.0
    for child in directory.iterdir():
        if child.is_dir():
            length, written = _size_and_time(child)
        else:
            length, written = child.stat().length, child.stat().mtime
        size, newest = size + length, max(newest, written)
    return size, newest
