"""Mesh config."""

import dataclasses
from typing import Literal

from stackjax.runtime.numbers import Size

MESH_AXES = ("replica", "fsdp", "tensor")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Mesh axis sizes. A single size may be -1 and takes the remaining devices."""

    replica: Literal[-1] | Size = 1
    """Parameter copies (data parallelism)."""
    fsdp: Literal[-1] | Size = -1
    """Shards for batch, parameters and optimizer state (ZeRO-3)."""
    tensor: Literal[-1] | Size = 1
    """Shards for heads, mlp and vocabulary (tensor parallelism)."""
