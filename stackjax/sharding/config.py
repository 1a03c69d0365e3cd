"""Config of the mesh, and of the memory for moments."""

import dataclasses
from typing import Literal

from stackjax.runtime.numbers import Size

MESH_AXES = ("replica", "fsdp", "context", "tensor")
EXPERT = "expert"
"""The mesh axis for experts, before `tensor`, in meshes with more than one shard of them."""
MomentMemory = Literal["device", "host"]
"""Where the optimizer's moments are between steps."""


def mesh_axes(config: "MeshConfig") -> tuple[str, ...]:
    """Returns the axes of a config's mesh, in order."""
    *others, tensor = MESH_AXES
    return MESH_AXES if config.expert == 1 else (*others, EXPERT, tensor)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Mesh axis sizes; the devices divide over axes with size -1.

    By default, up to 32 devices have a single copy of the parameters.
    """

    replica: Literal[-1] | Size = -1
    """Parameter copies (data parallelism); -1 takes the devices left by the other axes."""
    fsdp: Literal[-1] | Size = -1
    """Shards for batch, parameters and optimizer state (ZeRO-3); -1 takes all devices with a
    stated `replica`, otherwise up to 32 devices within a slice."""
    context: Size = 1
    """Shards for the sequence (context parallelism) and, with `fsdp`, for parameters and
    optimizer state."""
    expert: Size = 1
    """Shards for experts (expert parallelism) and, with `fsdp`, for the batch, other parameters
    and optimizer state."""
    tensor: Literal[-1] | Size = 1
    """Shards for heads, mlp and vocabulary (tensor parallelism); -1 takes the remaining devices
    with a stated `fsdp`."""
