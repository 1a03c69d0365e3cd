"""What XLA is told about the train step on each platform; nowhere else is it told anything.

Names are XLA's; `XLA_FLAGS` and, on TPUs, `LIBTPU_INIT_ARGS` still set what is not here.
docs/performance.md says which of these were measured.
"""

COMPILER_OPTIONS: dict[str, dict[str, bool | str]] = {
    "cpu": {},
    # Communication of shards is started early and ended late, and the loop over layers is
    # unrolled twice so that a layer's gathers run while the layer before computes.
    "gpu": {
        "xla_gpu_enable_latency_hiding_scheduler": True,
        "xla_gpu_enable_pipelined_all_gather": True,
        "xla_gpu_enable_pipelined_all_reduce": True,
        "xla_gpu_enable_pipelined_reduce_scatter": True,
        "xla_gpu_enable_while_loop_double_buffering": True,
    },
    # The same by way of fusions that compute while they communicate; the scheduler that
    # hides latency is on by itself.
    "tpu": {
        "xla_tpu_enable_async_collective_fusion": True,
        "xla_tpu_enable_async_collective_fusion_fuse_all_gather": True,
        "xla_tpu_enable_async_collective_fusion_multiple_steps": True,
        "xla_tpu_overlap_compute_collective_tc": True,
    },
}
"""Options of the compiler by `jax.default_backend()`."""
