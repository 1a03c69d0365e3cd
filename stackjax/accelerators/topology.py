"""Described devices: compiled for as devices, but not present."""

import functools
import importlib.util
import os
import re
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from stackjax.accelerators.devices import DeviceGroup
from stackjax.runtime.errors import UserError

_TARGETS = Path(__file__).parent / "targets"
_PLUGINS = ("jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12")
_HBM = re.compile(r"available HBM \((?P<size>[\d.]+)(?P<unit>[MG])\)")
_UNITS = {"M": 2**20, "G": 2**30}
_TOO_MANY = 2**40
"""Elements of an array larger than any device."""


def described_devices(group: DeviceGroup) -> Sequence[jax.Device]:
    """Returns devices to compile for, without a driver or any device present.

    Raises:
      UserError: The compiler is not installed or refuses the topology.
    """
    _check_installed(group)
    try:
        return _tpus(group) if group.is_tpu else _gpus(group)
    except jax.errors.JaxRuntimeError as error:
        if "INVALID_ARGUMENT" not in str(error):
            raise
        reason = str(error).splitlines()[0].removeprefix("INVALID_ARGUMENT: ").rstrip(".")
        raise UserError(
            f"--devices is '{group}', which the compiler refuses ({reason}); choose a topology "
            f"that exists."
        ) from None


def _tpus(group: DeviceGroup) -> Sequence[jax.Device]:
    sizes = "x".join(map(str, group.sizes))
    slices = {"num_slices": group.num_slices} if group.num_slices > 1 else {}
    return topologies.get_topology_desc(
        platform="tpu", topology_name=f"{group.name}:{sizes}", **slices
    ).devices


def _gpus(group: DeviceGroup) -> Sequence[jax.Device]:
    per_host, *hosts = group.sizes
    return topologies.get_topology_desc(
        platform="cuda",
        topology_name="",
        target_config=target_description(group),
        # Partitions x hosts x devices.
        topology=f"1x{hosts[0] if hosts else 1}x{per_host}",
    ).devices


def _check_installed(group: DeviceGroup) -> None:
    """Raises UserError if the compiler's package is not installed."""
    packages = ("libtpu",) if group.is_tpu else _PLUGINS
    if not any(_is_installed(package) for package in packages):
        extra = "tpu" if group.is_tpu else "cuda13"
        raise UserError(
            f"--devices is '{group}', but the compiler for it is not installed; "
            f'`pip install "jax[{extra}]=={jax.__version__}"` (no device or driver needed).'
        )


def _is_installed(package: str) -> bool:
    parent = package.partition(".")[0]
    return importlib.util.find_spec(parent) is not None and (
        importlib.util.find_spec(package) is not None
    )


def target_description(group: DeviceGroup) -> str:
    """Returns a GPU's description for XLA, a GpuTargetConfigProto as text.

    Raises:
      UserError: The user's description cannot be read.
    """
    path = group.target or _TARGETS / f"{group.name}.txtpb"
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--target is {path}, which cannot be read ({error}).") from None


def target_number(group: DeviceGroup, field: str) -> float:
    """Returns a number from a GPU's description; UserError if it is missing."""
    match = re.search(rf"\b{field}: ([\d.]+)", target_description(group))
    if match is None:
        raise UserError(
            f"--target is {group.target}, which has no {field}; give a file "
            f"`*.gpu_target_config.pbtxt`, which XLA writes on a GPU with "
            f"XLA_FLAGS=--xla_dump_to=DIRECTORY."
        )
    return float(match[1])


def usable_memory(group: DeviceGroup, devices: Sequence[jax.Device]) -> int:
    """Returns the bytes on each device that a JAX process may use."""
    if group.is_tpu:
        return _tpu_memory(devices[0])
    fraction = float(os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", 0.75))
    return int(fraction * target_number(group, "device_memory_size"))


@functools.lru_cache
def _tpu_memory(device: jax.Device) -> int:
    """Returns a TPU's memory in bytes, from the compiler's refusal of a larger program."""
    sharding = jax.sharding.SingleDeviceSharding(device)
    too_large = jax.ShapeDtypeStruct((_TOO_MANY,), jnp.float32, sharding=sharding)
    try:
        jax.jit(lambda x: x + 1).lower(too_large).compile()
    except jax.errors.JaxRuntimeError as error:
        match = _HBM.search(str(error))
        if match is None:
            raise
        return int(float(match["size"]) * _UNITS[match["unit"]])
    raise AssertionError("no TPU has 4 TiB of memory")


def devices_per_host(group: DeviceGroup, num_devices: int) -> int:
    """Returns the number of devices in each part with fast links: a GPU host or TPU slice."""
    return num_devices // group.num_slices if group.is_tpu else group.sizes[0]
