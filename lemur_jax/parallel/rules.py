"""One table from logical axes to mesh axes, for parameters and activations alike.

A parameter names its axes where it is made (`models/decoder.py`); only this file says how an axis is
sharded. FSDP is just the rules of `embed` and `expert_embed`: every matrix has one of them once, so every matrix, its
gradient and its optimizer moments are sharded over `fsdp`. Axis `expert` shards experts, and else what `fsdp` shards.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lemur_jax.common.errors import UserError

MeshAxes = str | tuple[str, ...] | None

RULES: dict[str, MeshAxes] = {
    # parameters
    "embed": ("fsdp", "expert"),
    "experts": "expert",
    "expert_embed": "fsdp",
    "vocab": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "head_dim": None,
    "layers": None,
    "norm": None,
    "rank": None,
    # activations
    "batch": ("data", "fsdp", "expert"),
    "length": "sequence",
    # The residual stream between products: norms are computed once, not `tensor` times.
    "residual_length": ("sequence", "tensor"),
    "keys": None,  # key positions: every query sees all of them
    "width": None,
}

# The axis to use instead of one that the mesh does not divide: vocabularies such as 32,005 are divisible by nothing,
# and in decoding there is one position.
IF_UNEVEN = {"vocab": "width", "residual_length": "length"}


def batch_shards(mesh: Mesh) -> int:
    """The number of shards of the rows of a batch."""
    return _num_shards(mesh, RULES["batch"])


def _num_shards(mesh: Mesh, axes: MeshAxes) -> int:
    names = (axes,) if isinstance(axes, str) else axes or ()
    return math.prod(mesh.shape[name] for name in names)


def spec(mesh: Mesh, axes: tuple[str, ...], shape: tuple[int, ...], what: str = "array") -> PartitionSpec:
    """The PartitionSpec of an array of this shape with these logical axes; `what` names it in messages.

    Raises:
      UserError: an axis that the table does not know, or one whose size the mesh does not divide.
    """
    if len(axes) != len(shape):
        raise UserError(f"{what} has shape {shape} but the logical axes {axes}")
    entries: list[MeshAxes] = []
    for axis, size in zip(axes, shape, strict=True):
        if axis in IF_UNEVEN and size % _num_shards(mesh, RULES[axis]):
            axis = IF_UNEVEN[axis]
        if axis not in RULES:
            raise UserError(
                f"{what}: no sharding rule for logical axis {axis!r}; add one to parallel/rules.py"
            )
        mesh_axes = RULES[axis]
        shards = _num_shards(mesh, mesh_axes)
        if size % shards:
            raise UserError(
                f"{what}: axis {axis!r} of size {size} is not divisible by {shards}, the size of mesh axis"
                f" {mesh_axes!r}: change the mesh or the model"
            )
        entries.append(mesh_axes)
    return PartitionSpec(*entries)


def param_shardings(mesh: Mesh, abstract: Mapping[str, Any], axes: Mapping[str, Any]) -> dict[str, Any]:
    """NamedShardings for a tree of arrays or ShapeDtypeStructs; `axes` has a tuple of logical axes at each leaf."""

    def sharding(path, leaf, leaf_axes):
        name = "/".join(str(key.key) for key in path)
        return NamedSharding(mesh, spec(mesh, leaf_axes, leaf.shape, name))

    return jax.tree_util.tree_map_with_path(sharding, dict(abstract), dict(axes))


def with_shardings(mesh: Mesh, abstract: Any, axes: Any) -> Any:
    """A tree of ShapeDtypeStructs with their shardings; arguments as in `param_shardings`."""
    shardings = param_shardings(mesh, abstract, axes)
    return jax.tree.map(lambda leaf, sharding: leaf.update(sharding=sharding), abstract, shardings)


def constrain(x: jax.Array, mesh: Mesh | None, *axes: str) -> jax.Array:
    """`with_sharding_constraint` by logical axes; does nothing without a mesh."""
    if mesh is None:
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec(mesh, axes, x.shape)))


def batch_sharding(mesh: Mesh, ndim: int = 2) -> NamedSharding:
    """Sharding of a batch array: [B, T] or, with `ndim` 1, [B]."""
    return NamedSharding(mesh, PartitionSpec(*(RULES["batch"], RULES["length"])[:ndim]))


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())
