"""The process environment in which XLA trains fastest on a CPU."""

CPU_ENVIRONMENT = {
    # A malloc that keeps the memory it is given, in huge pages; an arena of a thread would not
    # keep what exceeds its 64 MiB.
    "GLIBC_TUNABLES": (
        "glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=34359738368"
        ":glibc.malloc.arena_max=1"
    ),
}
"""Variables to set before a process starts. No flag of XLA is among them: those of oneDNN are
faster still (JAX 0.11.2), but the gradients that they give are wrong (docs/performance.md)."""
