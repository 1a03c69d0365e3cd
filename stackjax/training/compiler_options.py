"""Compiler options for the train step, by platform.

All supported JAX versions accept these options. `XLA_FLAGS` and, on TPUs, `LIBTPU_INIT_ARGS`
set further options. docs/performance.md lists measurements.

TPUs need none: with and without the options for asynchronous collectives, the compiler makes
the same program.
"""

COMPILER_OPTIONS: dict[str, dict[str, bool | str]] = {
    # Overlaps communication with computation. Without pipelined collectives: jax 0.10 and 0.11
    # name these options differently, 0.10 doubles activation memory, and double loop
    # unrolling breaks the scheduler (docs/performance.md).
    "gpu": {"xla_gpu_enable_latency_hiding_scheduler": True},
}
"""Options by the platform of the mesh's devices; none for other platforms."""
