"""The process environments that steps on a CPU are timed in."""

from typing import Literal

Environment = Literal["none", "cpu"]

ENVIRONMENTS: dict[Environment, dict[str, str]] = {
    "none": {},
    # A malloc that keeps the memory it is given, in huge pages.
    "cpu": {
        "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:"
        "glibc.malloc.trim_threshold=34359738368",
    },
}
"""Variables to set before a process starts. No flag of XLA is among them: those of oneDNN are
faster still (JAX 0.11.2), but the gradients that they give are wrong."""
