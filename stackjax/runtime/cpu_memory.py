"""What is done for a CPU as the device of a run; accelerators are not concerned.

XLA asks malloc for the temporaries of each step. glibc maps what is large anew every time, and
the kernel clears it: a third of a step of a small model (docs/performance.md).
"""

import ctypes
import os
from typing import Any

import jax

# Of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def keep_memory() -> None:
    """Starts JAX such that, on a CPU, the memory of a step serves the next.

    The process keeps the most that it has needed. If `GLIBC_TUNABLES` is set, it decides.
    """
    # In other threads malloc maps all that exceeds their arenas of 64 MiB, whatever it is told.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    if jax.default_backend() != "cpu" or "GLIBC_TUNABLES" in os.environ:
        return
    mallopt = _of_glibc("mallopt")
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, -1)


def release_memory() -> None:
    """Hands what the process keeps, and does not use, back to the system."""
    malloc_trim = _of_glibc("malloc_trim")
    if malloc_trim is not None:
        malloc_trim(0)


def _of_glibc(name: str) -> Any:
    return getattr(ctypes.CDLL(None), name, None)
