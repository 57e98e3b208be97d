"""What is in a checkpoint directory: steps, sizes, ages, what is whole, and how two configs differ."""

import time
from typing import Any

from etils import epath

from lemur_jax.checkpoint.arrays import open_params, read_parts
from lemur_jax.checkpoint.digest import RunningDigest
from lemur_jax.checkpoint.leaves import Leaf
from lemur_jax.checkpoint.manager import Damaged, read_metadata, steps_in
from lemur_jax.common.config import flatten
from lemur_jax.common.errors import UserError


def table(path: epath.PathLike) -> str:
    """One line a checkpoint, oldest first; every byte of each is read and verified.

    Raises:
      UserError: no checkpoint there.
    """
    directory, steps = steps_in(path)
    lines = [f"{directory}", f"{'step':>10} {'GB':>9} {'age':>10}  state"]
    for step in steps:
        size, newest = _size_and_time(directory / str(step))
        age = _age(time.time() - newest)
        lines.append(f"{step:>10} {size / 1e9:>9.3f} {age:>10}  {verdict(directory, step)}")
    return "\n".join(lines)


def verdict(directory: epath.Path, step: int) -> str:
    """ "verified", or what is wrong; one chunk of one array is in memory at a time."""
    try:
        leaves = read_metadata(directory, step)["leaves"]
        for item, of in leaves.items():
            arrays = open_params(directory, step, item)
            for name, leaf in of.items():
                if name not in arrays:
                    raise Damaged(f"{item}: {name} is missing")
                if _digest(arrays[name], name, leaf) != leaf.digest:
                    raise Damaged(f"{item}: {name} is not what was saved")
    except UserError as error:
        return f"DAMAGED: {error}"
    return f"verified ({', '.join(leaves)})"


def _digest(array: Any, name: str, leaf: Leaf) -> int:
    digest = RunningDigest()
    rows = int((array.chunk_layout.read_chunk.shape or (1,))[0] or 1)
    cuts = (
        [slice(i, min(i + rows, leaf.shape[0])) for i in range(0, leaf.shape[0], rows)]
        if leaf.shape
        else [...]
    )
    for part in read_parts(array, cuts, name):
        digest.update(part)
    return digest.value


def difference(path: epath.PathLike, old: int, new: int) -> str:
    """The config keys in which two checkpoints differ, with both values.

    Raises:
      UserError: there is no such step, or one was imported and has no config.
    """
    configs = []
    for step in (old, new):
        config = read_metadata(path, step)["config"]
        if config is None:
            raise UserError(f"the checkpoint of step {step} in {path} was imported: it has no run config")
        configs.append(flatten(config))
    keys = sorted(key for key in configs[0] | configs[1] if configs[0].get(key) != configs[1].get(key))
    if not keys:
        return f"the configs of steps {old} and {new} are the same"
    return "\n".join(f"{key}: {configs[0].get(key)!r} -> {configs[1].get(key)!r}" for key in keys)


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


def _age(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s"
