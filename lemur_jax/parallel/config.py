"""`config.mesh`: the sizes of the device mesh."""

import dataclasses

from lemur_jax.common.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Sizes of the mesh axes; one of them may be -1: all remaining devices."""

    data: int = 1  # copies of the parameters; a multiple of the number of TPU slices
    fsdp: int = -1  # devices that shard parameters, optimizer state and the batch
    expert: int = 1  # devices that shard the experts of a layer, and all else as `fsdp` does
    sequence: int = 1  # devices that shard the positions of a row
    tensor: int = 1  # devices that shard heads, the mlp and the vocabulary

    def __post_init__(self):
        sizes = dataclasses.asdict(self)
        text = " × ".join(f"{axis} {size}" for axis, size in sizes.items())
        if list(sizes.values()).count(-1) > 1:
            raise UserError(f"mesh {text}: only one axis may be -1")
        if any(size < 1 and size != -1 for size in sizes.values()):
            raise UserError(f"mesh {text}: sizes must be at least 1, or -1 for the rest")
