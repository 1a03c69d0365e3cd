"""Speeds of devices, for bounds and estimates of a step's time."""

import dataclasses

import jax

from stackjax.accelerators.devices import DeviceGroup
from stackjax.accelerators.topology import target_number
from stackjax.model.flops import peak_flops
from stackjax.runtime.errors import UserError

# Bytes per second on each JAX device. A TPU7x chip is two devices.
_TPU_MEMORY = {"v5e": 819e9, "v5p": 2765e9, "v6e": 1638e9, "tpu7x": 3690e9}
# 90 % of the links' datasheet rate for TPUs; NVLink's rate in one direction for GPUs.
_WIRE = {
    "v5e": 180e9,
    "v5p": 540e9,
    "v6e": 360e9,
    "tpu7x": 540e9,
    "a100-40": 300e9,
    "a100-80": 300e9,
    "h100": 450e9,
    "h200": 450e9,
    "b200": 900e9,
}
# Network adapters between hosts: 200 Gbit/s for each A100, 400 for each later GPU.
_NETWORK = {"a100-40": 25e9, "a100-80": 25e9, "h100": 50e9, "h200": 50e9, "b200": 50e9}
# PCIe's rate in one direction, for copies to and from the host's memory.
_HOST = {"h100": 50e9, "h200": 50e9, "b200": 50e9}
_OTHER_HOST = 25e9
# Fraction of the peak in attention kernels with fewer than 128 channels per head, and others.
_TPU_ATTENTION = (0.20, 0.40)
_AMPERE_ATTENTION = (0.48, 0.70)
_HOPPER_ATTENTION = (0.36, 0.52)

TPU_PRODUCTS = 0.90
GPU_PRODUCTS = 0.78
MEMORY_EFFICIENCY = 0.85
"""Fraction of the memory bandwidth in elementwise operations."""
EXPOSED = 0.10
"""Fraction of an asynchronous collective's time that is not hidden by computation."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Speeds:
    """Speeds of each device; assumptions, not measurements."""

    peak: float
    """FLOP/s in bfloat16."""
    memory: float
    """Bytes per second."""
    wire: float
    """Bytes per second to other devices, within a host or slice."""
    network: float | None
    """Bytes per second to other hosts; None for TPUs, whose slice is one network."""
    host: float
    """Bytes per second to or from the host's memory."""
    products: float
    """Fraction of the peak in matrix products."""
    attention: float
    """Fraction of the peak in attention kernels."""


def speeds_of(group: DeviceGroup, device: jax.Device, head_dim: int) -> Speeds:
    """Returns the assumed speeds of a device; UserError if its peak is unknown."""
    peak, is_wide = peak_flops(device), head_dim >= 128
    if peak is None:
        raise UserError(
            f"--target describes {device.device_kind!r}, whose peak FLOP/s are unknown; name "
            f"the most similar GPU with --devices, without --target."
        )
    if group.is_tpu:
        memory, products, attention = _TPU_MEMORY[group.name], TPU_PRODUCTS, _TPU_ATTENTION
    else:
        memory, products = target_number(group, "memory_bandwidth"), GPU_PRODUCTS
        is_ampere = group.name.startswith("a100")
        attention = _AMPERE_ATTENTION if is_ampere else _HOPPER_ATTENTION
    return Speeds(
        peak=peak,
        memory=memory,
        wire=_WIRE[group.name],
        network=_NETWORK.get(group.name),
        host=_HOST.get(group.name, _OTHER_HOST),
        products=products,
        attention=attention[is_wide],
    )
