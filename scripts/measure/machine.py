"""Description and peak speed of the machine, and checks against memory and time limits."""

import dataclasses
import functools
import os
import platform
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import psutil

from scripts.measure.result import CannotMeasure, seconds_of
from stackjax.runtime.cpu_memory import release_memory

VARIABLES = ("XLA_FLAGS", "GLIBC_TUNABLES", "LD_PRELOAD")
"""Environment variables with an effect on speed."""
_ENOUGH_SECONDS = 0.02
_WIDTHS = (1024, 2048, 4096, 8192)
_REPEATS = 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Machine:
    """A device's best speed with the simplest programs."""

    matmul_flops_per_second: float
    """Product of square matrices in the model's compute type."""
    matmul_width: int
    """Matrix rows: the smallest power of two with 20 ms, at most 8192."""
    copy_bytes_per_second: float
    """Bytes copied between arrays of this size; each byte is read and written."""


def num_cores() -> int | None:
    """Returns the usable cores, if known."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count()


def cpu_model() -> str:
    """Returns the processor's name, or else the architecture."""
    path = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.*)", path.read_text() if path.exists() else "")
    return found[1] if found else platform.machine()


@functools.cache
def measure_machine(dtype: jnp.dtype) -> Machine:
    """Returns the first device's speed for a matrix product and a copy."""
    for width in _WIDTHS:
        matrix = jnp.ones((width, width), dtype)
        seconds = _quickest(jax.jit(jnp.matmul), matrix, matrix)
        if seconds > _ENOUGH_SECONDS:
            break
    return Machine(
        matmul_flops_per_second=2 * width**3 / seconds,
        matmul_width=width,
        copy_bytes_per_second=matrix.nbytes / _quickest(jax.jit(jnp.copy), matrix),
    )


def _quickest(function: Callable[..., Any], *args: Any) -> float:
    jax.block_until_ready(function(*args))
    return min(seconds_of(lambda: function(*args))[0] for _ in range(_REPEATS))


def check_memory(what: str, bytes_per_device: int) -> None:
    """Raises CannotMeasure if a device has less memory free; a CPU's is the host's."""
    devices = jax.local_devices()
    release_memory()  # memory kept for later steps is free, too
    free = [
        statistics["bytes_limit"] - statistics["bytes_in_use"]
        for statistics in (device.memory_stats() or {} for device in devices)
        if "bytes_limit" in statistics
    ]
    least = min(free, default=psutil.virtual_memory().available // len(devices))
    if bytes_per_device > least:
        raise CannotMeasure(
            f"{what} needs {bytes_per_device / 2**30:.1f} GiB on each device, which has "
            f"{least / 2**30:.1f} GiB free"
        )


def check_time(num_steps: int, least_seconds: float, limit_seconds: float) -> None:
    """Raises CannotMeasure if steps take longer than the limit.

    Args:
      least_seconds: Lower bound per step.
    """
    seconds = num_steps * least_seconds
    if seconds > limit_seconds:
        raise CannotMeasure(
            f"{num_steps} steps of at least {least_seconds:.3g} s each are more than "
            f"--limit-seconds {limit_seconds:g}"
        )
