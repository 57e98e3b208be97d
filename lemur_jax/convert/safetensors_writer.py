"""Writes safetensors files one tensor at a time, split into shards as Hugging Face names them."""

import dataclasses
import json
import math
from collections.abc import Callable, Sequence

import numpy as np
from etils import epath

from lemur_jax.convert.dtypes import DTYPES

INDEX = "model.safetensors.index.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shard:
    """One file to write: its name and its tensors, in file order."""

    file: str
    names: tuple[str, ...]


def plan_shards(sizes: Sequence[tuple[str, int]], max_bytes: float) -> list[Shard]:
    """Cuts tensors, in their order, into files of at most `max_bytes`; a larger tensor gets its own.

    Args:
      sizes: (name, bytes) of each tensor.
      max_bytes: tensor bytes a file, header not counted.
    """
    groups: list[list[str]] = [[]]
    used = 0
    for name, size in sizes:
        if groups[-1] and used + size > max_bytes:
            groups.append([])
            used = 0
        groups[-1].append(name)
        used += size
    if len(groups) == 1:
        return [Shard(file="model.safetensors", names=tuple(groups[0]))]
    count = len(groups)
    return [
        Shard(file=f"model-{number:05d}-of-{count:05d}.safetensors", names=tuple(names))
        for number, names in enumerate(groups, start=1)
    ]


def write_index(directory: epath.Path, shards: Sequence[Shard], total_bytes: int) -> None:
    """The file that says which shard holds which tensor; not written for a single shard."""
    if len(shards) == 1:
        return
    weight_map = {name: shard.file for shard in shards for name in shard.names}
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def write_shard(
    path: epath.Path,
    names: Sequence[str],
    shapes: dict[str, tuple[int, ...]],
    dtype: str,
    read: Callable[[str], np.ndarray],
) -> None:
    """Writes one file.

    Args:
      path: the file.
      names: its tensors, in order.
      shapes: the shape of each.
      dtype: a name in `convert.dtypes.DTYPES`, of all of them.
      read: gives a tensor by name, C-contiguous, of that dtype; called once for each, in order.
    """
    numpy_dtype, code = DTYPES[dtype]
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        start, end = end, end + math.prod(shapes[name]) * numpy_dtype.itemsize
        header[name] = {"dtype": code, "shape": list(shapes[name]), "data_offsets": [start, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # readers map the tensors: keep them aligned
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little"))
        file.write(encoded)
        for name in names:
            # As bytes: NumPy gives no buffer of bfloat16.
            file.write(memoryview(read(name).reshape(-1).view(np.uint8)))
