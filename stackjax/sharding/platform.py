"""The device kind that a program is compiled for."""

from typing import Literal, Protocol

import jax

Platform = Literal["cpu", "gpu", "tpu"]

_GPU_NAMES = ("cuda", "gpu", "rocm")


class DeviceKind(Protocol):
    """A device's platform and name: a JAX device, a described device or a mesh's device."""

    @property
    def platform(self) -> str: ...
    @property
    def device_kind(self) -> str: ...


def target_device() -> DeviceKind:
    """Returns the device kind that the current program is compiled for.

    This is the current mesh's device kind, even if this process has other devices: a process
    without a TPU can compile for a TPU. Without a mesh, the result is JAX's first device.
    """
    return jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]


def platform_of(device: DeviceKind) -> str:
    """Returns a device's platform: "cpu", "gpu" or "tpu"; other names as in JAX."""
    return "gpu" if device.platform in _GPU_NAMES else device.platform


def is_nvidia(device: DeviceKind) -> bool:
    """Returns whether a device is an NVIDIA GPU, by its name.

    Tesla cards (V100, T4 and older) are named without "NVIDIA", so the result is false.
    """
    return platform_of(device) == "gpu" and device.device_kind.startswith("NVIDIA")
