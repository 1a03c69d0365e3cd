"""Compiler options of the train step on each platform; they are set nowhere else.

Every option here is accepted by every supported version of JAX. `XLA_FLAGS` and, on TPUs,
`LIBTPU_INIT_ARGS` set others. docs/performance.md says which were measured.
"""

COMPILER_OPTIONS: dict[str, dict[str, bool | str]] = {
    # Overlaps communication with computation. The options that pipeline collectives are left
    # out: jax 0.10 has them under other names than 0.11 and doubles the activations with
    # them, and unrolling loops twice breaks the scheduler (docs/performance.md).
    "gpu": {"xla_gpu_enable_latency_hiding_scheduler": True},
    # Fusions that compute while they communicate. The scheduler that hides latency is on by
    # default.
    "tpu": {
        "xla_tpu_enable_async_collective_fusion": True,
        "xla_tpu_enable_async_collective_fusion_fuse_all_gather": True,
        "xla_tpu_enable_async_collective_fusion_multiple_steps": True,
        "xla_tpu_overlap_compute_collective_tc": True,
    },
}
"""Options by `jax.default_backend()`; other backends need none."""
