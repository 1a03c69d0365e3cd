"""Process environments for step times on a CPU."""

from typing import Literal

Environment = Literal["none", "cpu"]

ENVIRONMENTS: dict[Environment, dict[str, str]] = {
    "none": {},
    # A malloc with huge pages that keeps its memory.
    "cpu": {
        "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:"
        "glibc.malloc.trim_threshold=34359738368",
    },
}
"""Variables to set before a process starts. XLA flags are absent: oneDNN flags are even faster
(JAX 0.11.2), but give wrong gradients."""
