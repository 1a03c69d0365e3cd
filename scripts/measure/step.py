"""Cost of a phase's train step: FLOPs, compilation, time."""

import dataclasses
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from scripts.measure.machine import check_memory, check_time, measure_machine
from scripts.measure.result import NotMeasured, Number, peaks_since, read_peaks, seconds_of
from stackjax.config import Config
from stackjax.data import packing
from stackjax.data.batch import Batch
from stackjax.data.device import local_rows, put
from stackjax.model.flops import flops_6nd, matmul_flops, mfu, num_params
from stackjax.model.module import compute_dtype
from stackjax.sharding.partition import on_mesh
from stackjax.training.compile import (
    abstract_state,
    clear_programs,
    compile_step,
    jit_step,
    new_state,
    step_inputs,
)
from stackjax.training.phase import Phase
from stackjax.training.program_memory import program_memory
from stackjax.training.train_state import TrainState, placed

Step = Callable[[TrainState, Batch], tuple[TrainState, Any]]
"""A compiled train step with the inputs of its phase."""

WARMUP_STEPS = 3
PROFILED_STEPS = 5
EXECUTION = ("attention", "remat", "scan_unroll", "loss_chunk")
"""Execution fields of `ModelConfig`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """Model and batch sizes."""

    params: int
    num_layers: int
    embed_dim: int
    vocab_size: int
    seq_len: int
    batch_size: int
    accumulate: int
    tokens_per_step: int
    compute_dtype: str
    execution: str
    """Execution fields of `ModelConfig`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flops:
    """FLOPs per step over all devices, by formula and by XLA."""

    six_nd_flops: int
    """6 N D, with N all parameters."""
    matmul_flops: int
    """All matrix products, attention as a full square."""
    palm_flops: int
    """6 N + 12 L T D for each token, with N less the input embedding (arXiv:2204.02311)."""
    palm_causal_flops: int
    """The same with half the attention, as needed by a causal model."""
    xla_flops: Number
    """XLA's count before optimization, with scans unrolled: includes norms, softmax, remat,
    and the update (once per microbatch)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """The compiled step; bytes are per device."""

    compile_seconds: float
    """Tracing, lowering and XLA, without the persistent cache."""
    argument_bytes: int
    """State and batch."""
    temporary_bytes: int
    """Temporaries."""
    program_bytes: int
    """Arguments, temporaries, and results without an aliased argument."""
    xla_scanned_flops: Number
    """XLA's count after compilation, over all devices; a scan's body counts once."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Times:
    """Step times, on a batch already on the devices."""

    median_seconds: float
    """Single steps."""
    p10_seconds: float
    p90_seconds: float
    back_to_back_seconds: float
    """Mean over steps without waiting in between."""
    tokens_per_second: float
    """At the median."""
    back_to_back_tokens_per_second: float
    palm_flops_per_second: float
    """At the median, over all devices."""
    matmul_share: float
    """`palm_flops_per_second` over the rate of large matrix products."""
    mfu: Number
    """`palm_flops_per_second` over the devices' peak."""
    causal_mfu: Number
    """The same by `palm_causal_flops`."""
    device_peak_bytes: Number
    host_peak_bytes: Number


def describe(config: Config, phase: Phase) -> Sizes:
    """Returns a phase's model and batch sizes."""
    model = phase.model
    return Sizes(
        params=num_params(model),
        num_layers=model.num_layers,
        embed_dim=model.embed_dim,
        vocab_size=model.vocab_size,
        seq_len=phase.seq_len,
        batch_size=phase.batch_size,
        accumulate=phase.accumulate,
        tokens_per_step=phase.per_step.tokens,
        compute_dtype=str(compute_dtype(model)),
        execution=", ".join(f"{field}={getattr(model, field)}" for field in EXECUTION),
    )


def palm_flops(config: Config, phase: Phase) -> tuple[int, int]:
    """Returns `palm_flops` and `palm_causal_flops` per step."""
    seq_len, model, trained = phase.seq_len, phase.model, phase.trained_layers
    attention = matmul_flops(model, seq_len, trained) - matmul_flops(model, 0, trained)
    # 6ND counts the input embedding, but a gather has no products.
    per_entry = 6 if trained is None else 2
    table = 0 if model.tie_head else per_entry * model.vocab_size * model.embed_dim
    full = flops_6nd(model, trained) - table + attention
    tokens = phase.per_step.tokens
    return tokens * full, tokens * (full - attention // 2)


def measure_flops(config: Config, phase: Phase, mesh: Mesh) -> Flops:
    """Returns the FLOPs per step."""
    full, causal = palm_flops(config, phase)
    return Flops(
        six_nd_flops=phase.per_step.flops_6nd,
        matmul_flops=phase.per_step.flops,
        palm_flops=full,
        palm_causal_flops=causal,
        xla_flops=_unrolled_flops(config, phase, mesh),
    )


def _unrolled_flops(config: Config, phase: Phase, mesh: Mesh) -> Number:
    """Returns XLA's count for a microbatch without scans, times the microbatches."""
    model = dataclasses.replace(phase.model, scan_unroll=phase.model.num_layers)
    rows = phase.batch_size // phase.accumulate
    unrolled = dataclasses.replace(phase, model=model, accumulate=1, batch_size=rows)
    state = on_mesh(abstract_state(phase), mesh)
    step = jit_step(unrolled)
    batch = random_batch(config, unrolled, mesh)
    counted: Any = step.lower(phase.step_inputs, state, batch).cost_analysis()
    if counted is None:
        return NotMeasured("XLA counts what it has not optimised with JAX_PLATFORMS=cpu alone")
    return phase.accumulate * counted["flops"]


def matmul_rate(phase: Phase, mesh: Mesh) -> float:
    """Returns the FLOP/s for large matrix products on all devices."""
    return mesh.size * measure_machine(compute_dtype(phase.model)).matmul_flops_per_second


def least_seconds(config: Config, phase: Phase, mesh: Mesh) -> float:
    """Returns a lower bound on the step time, at the rate of large matrix products."""
    return palm_flops(config, phase)[1] / matmul_rate(phase, mesh)


def compile_phase(config: Config, phase: Phase, mesh: Mesh) -> tuple[Step, Program]:
    """Returns a phase's compiled train step, without allocating a state."""
    clear_programs()
    start = time.perf_counter()
    step = compile_step(config, phase)
    seconds = time.perf_counter() - start
    memory = program_memory(step, jax.default_backend())
    return functools.partial(step, step_inputs(phase)), Program(
        compile_seconds=seconds,
        argument_bytes=memory.arguments,
        temporary_bytes=memory.temporaries,
        program_bytes=memory.total,
        xla_scanned_flops=_scanned_flops(step, mesh),
    )


def _scanned_flops(step: jax.stages.Compiled, mesh: Mesh) -> Number:
    counted: Any = step.cost_analysis() or {}
    if "flops" not in counted:
        return NotMeasured("XLA does not count on this backend")
    return mesh.size * counted["flops"]


def random_rows(config: Config, phase: Phase, mesh: Mesh) -> Batch:
    """Returns this process's rows of a random batch."""
    num_rows = phase.batch_size // phase.accumulate
    shape = (phase.accumulate, len(local_rows(mesh, num_rows)), phase.seq_len)
    tokens = np.random.default_rng(0).integers(0, phase.model.vocab_size, shape, np.int32)
    segments = np.zeros_like(tokens)
    return Batch(
        tokens=tokens,
        positions=packing.positions(segments),
        segments=segments if config.data.mask_documents else None,
        loss_weights=packing.loss_weights(segments),
    )


def random_batch(config: Config, phase: Phase, mesh: Mesh) -> Batch:
    """Returns a random batch on the mesh."""
    num_rows = phase.batch_size // phase.accumulate
    return next(put([random_rows(config, phase, mesh)], mesh, num_rows))


def measure_times(
    config: Config,
    phase: Phase,
    mesh: Mesh,
    *,
    step: Step,
    program: Program,
    num_steps: int,
    limit_seconds: float,
    profile: Path | None,
) -> Times:
    """Returns a phase's step times.

    Args:
      num_steps: Steps to time, singly and back to back.
      limit_seconds: Limit for all steps.
      profile: Directory for an XProf trace of further steps.

    Raises:
      CannotMeasure: Memory or time do not suffice.
    """
    check_memory("a step", program.program_bytes)
    before, total = read_peaks(), WARMUP_STEPS + 2 * num_steps
    check_time(total, least_seconds(config, phase, mesh), limit_seconds)
    state = placed(phase, new_state(config, phase))
    batch = random_batch(config, phase, mesh)
    first, (state, _) = seconds_of(lambda: step(state, batch))
    check_time(total, first, limit_seconds)
    _, state = run_steps(step, state, batch, WARMUP_STEPS - 1)
    seconds, state = step_seconds(step, state, batch, num_steps)
    together, state = run_steps(step, state, batch, num_steps)
    if profile is not None:
        with jax.profiler.trace(str(profile / phase.directory)):
            run_steps(step, state, batch, PROFILED_STEPS)
    median, p10, p90 = (float(np.percentile(seconds, point)) for point in (50, 10, 90))
    devices = mesh.devices.flatten().tolist()
    full, causal = (each / median for each in palm_flops(config, phase))
    return Times(
        median_seconds=median,
        p10_seconds=p10,
        p90_seconds=p90,
        back_to_back_seconds=together / num_steps,
        tokens_per_second=phase.per_step.tokens / median,
        back_to_back_tokens_per_second=phase.per_step.tokens * num_steps / together,
        palm_flops_per_second=full,
        matmul_share=full / matmul_rate(phase, mesh),
        mfu=_mfu(full, devices),
        causal_mfu=_mfu(causal, devices),
        **peaks_since(before),
    )


def run_steps(
    step: Step, state: TrainState, batch: Batch, num_steps: int
) -> tuple[float, TrainState]:
    """Returns the total time of back-to-back steps, and the state."""
    start = time.perf_counter()
    for _ in range(num_steps):
        state, _ = step(state, batch)
    jax.block_until_ready(state)
    return time.perf_counter() - start, state


def step_seconds(
    step: Step, state: TrainState, batch: Batch, num_steps: int
) -> tuple[list[float], TrainState]:
    """Returns each step's time, and the state."""
    seconds = []
    for _ in range(num_steps):
        each, state = run_steps(step, state, batch, 1)
        seconds.append(each)
    return seconds, state


def _mfu(flops_per_second: float, devices: list[jax.Device]) -> Number:
    share = mfu(flops_per_second, devices)
    if share is None:
        return NotMeasured(f"no peak is known of {devices[0].device_kind!r}")
    return share
