"""The device mesh, and the one table from logical axis names to mesh axes."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from stackjax.axes import Axes
from stackjax.errors import UserError
from stackjax.quantity import Size

MESH_AXES = ("replica", "fsdp", "tensor")

RULES: dict[str, str | tuple[str, ...]] = {
    "batch": ("replica", "fsdp"),
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
}
"""Mesh axes that shard a logical axis; an axis that is not named here is whole."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Sizes of the mesh axes; at most one may be -1 and takes the devices that are left."""

    replica: Literal[-1] | Size = 1
    """Copies of the parameters (data parallel)."""
    fsdp: Literal[-1] | Size = -1
    """Shards of batch, parameters and optimizer state (ZeRO-3)."""
    tensor: Literal[-1] | Size = 1
    """Shards of heads, mlp and vocabulary (tensor parallel)."""


def logical(*names: str | None) -> P | None:
    """Returns the partition of an array with these logical axes.

    None outside a mesh, and on one whose axes the compiler lays out by itself. Activations
    name `embed` as None: the residual stream is whole on every device, only parameters are
    sharded along it.
    """
    if not _is_explicit(jax.sharding.get_abstract_mesh()):
        return None
    return P(*(RULES.get(name) if name else None for name in names))


def partition(axes: Axes) -> P | None:
    """Returns the partition of a parameter; gains and other vectors stay whole."""
    return logical(*axes.names) if axes.reads else logical(*(None,) * len(axes.names))


def layout(x: jax.Array) -> P | None:
    """Returns the partition in the type of an array; None where `logical` has none."""
    is_explicit = _is_explicit(jax.sharding.get_abstract_mesh())
    return jax.typeof(x).sharding.spec if is_explicit else None


def whole_along(name: str, spec: P) -> P:
    """Returns a partition without the shards along a logical axis."""
    return P(*(None if axis == RULES[name] else axis for axis in spec))


def on_mesh(abstract: Any, mesh: Mesh) -> Any:
    """Returns a tree of abstract arrays with their partitions on a mesh of devices."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, partition_of(leaf))
        ),
        abstract,
    )


def move(tree: Any, mesh: Mesh) -> Any:
    """Returns a tree of arrays on a mesh, with the partitions that they have.

    What is there already is not copied.
    """
    return jax.tree.map(
        lambda leaf: jax.device_put(leaf, NamedSharding(mesh, partition_of(leaf))), tree
    )


def laid_out(function: Callable[..., Any], layout: Any) -> Callable[..., Any]:
    """Returns a function inside which the compiler lays out every array.

    Args:
      layout: The partitions of what it returns.
    """
    return jax.sharding.auto_axes(function, out_sharding=layout)


def partition_of(leaf: jax.Array | jax.ShapeDtypeStruct) -> P:
    """Returns the partition of an array; scalars that no mesh has seen are whole."""
    return P() if leaf.sharding is None else leaf.sharding.spec  # type: ignore


def mesh_shape(config: MeshConfig, num_devices: int) -> tuple[int, ...]:
    """Returns the sizes of the mesh axes on `num_devices` devices."""
    sizes = [getattr(config, axis) for axis in MESH_AXES]
    stated = f"mesh {dict(zip(MESH_AXES, sizes, strict=True))}"
    if any(size < 1 and size != -1 for size in sizes) or sizes.count(-1) > 1:
        raise UserError(f"{stated}: sizes are at least 1, and at most one is -1.")
    known = math.prod(size for size in sizes if size != -1)
    if num_devices % known or (-1 not in sizes and known != num_devices):
        raise UserError(
            f"{stated} does not fit {num_devices} devices; the sizes must multiply to "
            f"{num_devices}, or set one of them to -1."
        )
    return tuple(num_devices // known if size == -1 else size for size in sizes)


def build_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Returns the mesh of explicit axes that `config` describes.

    On several TPU slices, `replica` spans the slices as far as it can, because only
    gradients cross it, and `fsdp` spans the rest.

    Raises:
      UserError: The sizes do not fit the devices, or their slices.
    """
    devices = jax.devices() if devices is None else devices
    shape = mesh_shape(config, len(devices))
    axis_types = (AxisType.Explicit,) * len(MESH_AXES)
    num_slices = len({getattr(device, "slice_index", 0) for device in devices})
    if num_slices == 1:
        return jax.make_mesh(shape, MESH_AXES, axis_types=axis_types, devices=devices)
    across = slices_along_axes(shape, num_slices)
    within = [size // slices for size, slices in zip(shape, across, strict=True)]
    # `make_mesh` refuses devices of several slices.
    layout = mesh_utils.create_hybrid_device_mesh(within, across, devices)
    return Mesh(layout, MESH_AXES, axis_types=axis_types)


def slices_along_axes(shape: Sequence[int], num_slices: int) -> tuple[int, ...]:
    """Returns how many TPU slices each mesh axis spans; UserError if they do not fit.

    >>> slices_along_axes((2, 16, 1), 4)
    (2, 2, 1)
    """
    replica = math.gcd(shape[0], num_slices)
    fsdp = num_slices // replica
    if shape[1] % fsdp:
        sizes = dict(zip(MESH_AXES, shape, strict=True))
        raise UserError(
            f"mesh {sizes} does not fit {num_slices} TPU slices: the slices must divide "
            f"replica x fsdp; set mesh.replica to {num_slices}, and mesh.fsdp to -1."
        )
    return (replica, fsdp, 1)


def mesh_that_divides(*sizes: int) -> Mesh:
    """Returns the mesh of as many devices of this process as divide all sizes."""
    devices = jax.local_devices()
    return build_mesh(MeshConfig(), devices[: math.gcd(len(devices), *sizes)])


def num_shards(name: str) -> int:
    """Returns over how many devices the current mesh splits a logical axis.

    1 where the compiler lays out the axes by itself.
    """
    mesh = jax.sharding.get_abstract_mesh()
    rule = RULES.get(name, ())
    axes = (rule,) if isinstance(rule, str) else rule
    return math.prod(mesh.shape[axis] for axis in axes) if _is_explicit(mesh) else 1


def _is_explicit(mesh: jax.sharding.AbstractMesh) -> bool:
    return not mesh.empty and AxisType.Auto not in mesh.axis_types
