"""The process environments that steps on a CPU are timed in."""

from typing import Literal

Environment = Literal["none", "cpu"]

# A malloc that keeps the memory it is given, in huge pages.
_KEEPS = ("hugetlb=1", "mmap_max=0", "trim_threshold=34359738368")

ENVIRONMENTS: dict[Environment, dict[str, str]] = {
    "none": {},
    "cpu": {"GLIBC_TUNABLES": ":".join(f"glibc.malloc.{setting}" for setting in _KEEPS)},
}
"""Variables to set before a process starts. No flag of XLA is among them: those of oneDNN are
faster still (JAX 0.11.2), but the gradients that they give are wrong."""
