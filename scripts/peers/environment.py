"""The process environment in which XLA trains fastest on a CPU, and its one table."""

MALLOC = (
    "glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=34359738368"
)
"""GLIBC_TUNABLES for a malloc that keeps the memory it is given, in huge pages."""

XLA_FLAGS = {
    (0, 11): "--xla_cpu_use_onednn=true --xla_cpu_experimental_onednn_fusion_type=dot",
    (0, 10): "--xla_cpu_experimental_ynn_fusion_type=dot,eltwise,reduce",
}
"""Flags of XLA from each version of JAX on, newest first."""


def cpu_environment(jax_version: str | None) -> dict[str, str]:
    """Returns the variables to set before a process starts; None is a process without JAX."""
    if jax_version is None:
        return {"GLIBC_TUNABLES": MALLOC}
    major, minor, *_ = jax_version.split(".")
    flags = next(text for since, text in XLA_FLAGS.items() if (int(major), int(minor)) >= since)
    return {"GLIBC_TUNABLES": MALLOC, "XLA_FLAGS": flags}
