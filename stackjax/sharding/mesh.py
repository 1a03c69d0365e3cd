"""The device mesh."""

import math
from collections.abc import Sequence

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from stackjax.runtime.errors import UserError
from stackjax.sharding.config import MESH_AXES, MeshConfig, mesh_axes
from stackjax.sharding.platform import platform_of

_MAX_SHARDS = 32
"""Largest default number of parameter shards, `fsdp` times `context`. On TPUs with more shards,
the compiler replaces gradient reduce-scatters by synchronous all-reduces of whole float32
gradients (docs/performance.md)."""


def mesh_shape(config: MeshConfig, num_devices: int, num_slices: int = 1) -> tuple[int, ...]:
    """Returns the sizes of the axes from `mesh_axes`.

    Args:
      num_slices: Number of TPU slices or GPU hosts, as from `num_slices_of`.

    Raises:
      UserError: The sizes do not fit the devices.
    """
    axes = mesh_axes(config)
    sizes = {axis: getattr(config, axis) for axis in axes}
    replica, fsdp, tensor = config.replica, config.fsdp, config.tensor
    stated = f"mesh {sizes}"
    if any(size < 1 and size != -1 for size in sizes.values()) or fsdp == tensor == -1:
        raise UserError(
            f"{stated}: sizes are at least 1, or -1; fsdp and tensor cannot both be -1."
        )
    known = math.prod(size for size in sizes.values() if size != -1)
    if num_devices % known or (-1 not in sizes.values() and known != num_devices):
        raise UserError(
            f"{stated} does not fit {num_devices} devices; the sizes must multiply to "
            f"{num_devices}, or set one of them to -1."
        )
    left = num_devices // known
    if tensor == -1:
        found = {"replica": max(replica, 1), "tensor": left}
    elif replica != -1:
        found = {"fsdp": left if fsdp == -1 else fsdp}
    elif fsdp != -1:
        found = {"replica": left}
    else:
        others = left // num_slices if left % num_slices == 0 else left
        fsdp = default_fsdp(others, config.context * config.expert)
        found = {"replica": left // fsdp, "fsdp": fsdp}
    return tuple((sizes | found)[axis] for axis in axes)


def default_fsdp(num_devices: int, others: int = 1) -> int:
    """Returns the largest divisor with up to 32 parameter shards.

    >>> default_fsdp(256), default_fsdp(48), default_fsdp(64, others=2)
    (32, 24, 16)

    Args:
      others: Parameter shards along other axes: `context` and `expert`.
    """
    most = max(_MAX_SHARDS // others, 1)
    return max(size for size in range(1, most + 1) if num_devices % size == 0)


def num_slices_of(devices: Sequence[jax.Device]) -> int:
    """Returns the number of TPU slices or GPU hosts: device groups with a fast network."""
    if _are_described_gpus(devices):
        return len({device.process_index for device in devices})
    return len({getattr(device, "slice_index", 0) for device in devices})


def _are_described_gpus(devices: Sequence[jax.Device]) -> bool:
    """Returns whether the GPUs are described. Real GPUs have a `slice_index` for each host."""
    client = type(getattr(devices[0], "client", None)).__name__
    return platform_of(devices[0]) == "gpu" and client.startswith("CompileOnly")


def build_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Returns the configured mesh, with explicit axes.

    `replica` spans as many TPU slices or GPU hosts as possible, because only gradients are
    communicated along `replica`. `fsdp` spans the rest.

    Raises:
      UserError: The sizes do not fit the devices or slices.
    """
    devices = jax.devices() if devices is None else devices
    num_slices = num_slices_of(devices)
    shape = mesh_shape(config, len(devices), num_slices)
    across = slices_along_axes(shape, num_slices)
    within = [size // slices for size, slices in zip(shape, across, strict=True)]
    # `jax.make_mesh` refuses devices from several slices, and 32 shards on 8 x 8 TPU v6e chips.
    if num_slices == 1:
        layout = mesh_utils.create_device_mesh(within, devices, allow_split_physical_axes=True)
    else:
        layout = mesh_utils.create_hybrid_device_mesh(
            within,
            across,
            devices,
            process_is_granule=_are_described_gpus(devices),
            allow_split_physical_axes=True,
        )
    axes = mesh_axes(config)
    return Mesh(layout, axes, axis_types=(AxisType.Explicit,) * len(axes))


def slices_along_axes(shape: Sequence[int], num_slices: int) -> tuple[int, ...]:
    """Returns the number of TPU slices or GPU hosts along each mesh axis.

    >>> slices_along_axes((2, 16, 1, 1), 4)
    (2, 2, 1, 1)

    Raises:
      UserError: The slices do not divide the mesh.
    """
    replica = math.gcd(shape[0], num_slices)
    fsdp = num_slices // replica
    if shape[1] % fsdp:
        sizes = dict(zip(MESH_AXES, shape, strict=False))
        raise UserError(
            f"mesh {sizes} does not fit {num_slices} TPU slices or GPU hosts: they must divide "
            f"replica x fsdp; set mesh.replica to {num_slices}, and mesh.fsdp to -1."
        )
    return (replica, fsdp, *(1,) * (len(shape) - 2))


def without_context(mesh: Mesh) -> Mesh:
    """Returns a mesh with the same devices and `context` merged into `fsdp`.

    Parameters keep their shards. Whole sequences are on every device.
    """
    replica, fsdp, context, *others = mesh.devices.shape
    devices = mesh.devices.reshape(replica, fsdp * context, 1, *others)
    return Mesh(devices, mesh.axis_names, axis_types=mesh.axis_types)


def largest_mesh(*sizes: int) -> Mesh:
    """Returns an `fsdp` mesh with the most local devices that divide all sizes."""
    devices = jax.local_devices()
    return build_mesh(MeshConfig(replica=1), devices[: math.gcd(len(devices), *sizes)])
