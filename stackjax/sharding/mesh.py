"""The device mesh."""

import math
from collections.abc import Sequence

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from stackjax.runtime.errors import UserError
from stackjax.sharding.config import MESH_AXES, MeshConfig


def mesh_shape(config: MeshConfig, num_devices: int) -> tuple[int, ...]:
    """Returns the mesh axis sizes for `num_devices` devices."""
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
    """Returns the configured mesh, with explicit axes.

    With several TPU slices, `replica` spans as many slices as possible, because only gradients
    are communicated along `replica`. `fsdp` spans the rest.

    Raises:
      UserError: The sizes do not fit the devices or slices.
    """
    devices = jax.devices() if devices is None else devices
    shape = mesh_shape(config, len(devices))
    axis_types = (AxisType.Explicit,) * len(MESH_AXES)
    num_slices = len({getattr(device, "slice_index", 0) for device in devices})
    if num_slices == 1:
        return jax.make_mesh(shape, MESH_AXES, axis_types=axis_types, devices=devices)
    across = slices_along_axes(shape, num_slices)
    within = [size // slices for size, slices in zip(shape, across, strict=True)]
    # `make_mesh` refuses devices from several slices.
    layout = mesh_utils.create_hybrid_device_mesh(within, across, devices)
    return Mesh(layout, MESH_AXES, axis_types=axis_types)


def slices_along_axes(shape: Sequence[int], num_slices: int) -> tuple[int, ...]:
    """Returns the number of TPU slices along each mesh axis; UserError if impossible.

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
    return (replica, fsdp, *(1,) * (len(shape) - 2))


def largest_mesh(*sizes: int) -> Mesh:
    """Returns an `fsdp` mesh with the most local devices that divide all sizes."""
    devices = jax.local_devices()
    return build_mesh(MeshConfig(), devices[: math.gcd(len(devices), *sizes)])
