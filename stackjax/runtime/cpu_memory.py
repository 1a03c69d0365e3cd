"""Memory reuse between steps on CPUs.

XLA allocates the temporary arrays of each step with malloc. glibc maps large arrays anew at
every step, and clearing the pages takes a third of a small model's step time
(docs/performance.md). Accelerators are not affected.
"""

import ctypes
import os
from typing import Any

import jax

# From glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def keep_memory() -> None:
    """Starts JAX and, on a CPU, keeps freed memory for the next step.

    Memory use stays at the peak. `GLIBC_TUNABLES`, if set, takes precedence.
    """
    # In other threads malloc maps arrays larger than 64 MiB anew, whatever the options.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    if jax.default_backend() != "cpu" or "GLIBC_TUNABLES" in os.environ:
        return
    mallopt = _glibc_function("mallopt")
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, -1)


def release_memory() -> None:
    """Returns unused memory to the system."""
    malloc_trim = _glibc_function("malloc_trim")
    if malloc_trim is not None:
        malloc_trim(0)


def _glibc_function(name: str) -> Any:
    return getattr(ctypes.CDLL(None), name, None)
