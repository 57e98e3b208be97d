"""What a checkpoint says of its leaves, and whether that is what a program wants."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax

from lemur_jax.common.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Leaf:
    """A leaf as it was saved; `digest` as in `checkpoint.digest`."""

    shape: tuple[int, ...]
    dtype: str
    digest: int


def describe(array: Any, digest: int) -> Leaf:
    """The `Leaf` of an array whose digest is known."""
    return Leaf(shape=tuple(array.shape), dtype=str(array.dtype), digest=digest)


def check_wanted(stored: Mapping[str, Leaf] | None, wanted: Any, where: str, *, dtypes: bool = True) -> None:
    """Compares leaves with the wanted ones by name, shape and dtype.

    Args:
      stored: what the checkpoint holds; None: it has no such item.
      wanted: a tree of arrays or ShapeDtypeStructs.
      where: checkpoint and item, for messages.
      dtypes: whether dtypes must be the same.

    Raises:
      UserError: naming the first leaf that differs.
    """
    if stored is None:
        raise UserError(f"{where}: there is none; it is an export or import of parameters alone")
    expected = named(wanted)
    if missing := sorted(expected.keys() - stored.keys()):
        raise UserError(f"{where}: {missing[0]} is missing ({len(missing)} missing in all)")
    if unexpected := sorted(stored.keys() - expected.keys()):
        raise UserError(
            f"{where}: {unexpected[0]} is not wanted by this config ({len(unexpected)} such in all)"
        )
    for name, leaf in expected.items():
        found = stored[name]
        if found.shape != tuple(leaf.shape):
            raise UserError(f"{where}: {name} has shape {found.shape}, this config wants {leaf.shape}")
        if dtypes and found.dtype != str(leaf.dtype):
            raise UserError(f"{where}: {name} is {found.dtype}, this config wants {leaf.dtype}")


def on_host(array: Any) -> bool:
    """Whether an array lies in the host's memory: NumPy's, or one of CPU devices."""
    devices: set[Any] = array.sharding.device_set if isinstance(array, jax.Array) else set()
    return all(device.platform == "cpu" for device in devices)


def named(tree: Any) -> dict[str, Any]:
    """Leaves by path, in the words of Orbax, for which a named tuple is a dictionary."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {"/".join(_key(key) for key in path): leaf for path, leaf in leaves}


def _key(key: Any) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)
