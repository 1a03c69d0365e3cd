"""Checks before the first token: every phase, evaluated abstractly."""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType

from stackjax.config import Config
from stackjax.growth.moments import check_moments
from stackjax.model.attention_kernels import has_kernel
from stackjax.model.config import axis_size
from stackjax.runtime.errors import UserError
from stackjax.sharding.config import mesh_axes
from stackjax.sharding.mesh import mesh_shape
from stackjax.sharding.partition import RULES, num_shards, partition_of
from stackjax.sharding.platform import DeviceKind, platform_of
from stackjax.training.compile import abstract_state
from stackjax.training.expand import expand
from stackjax.training.phase import Phase
from stackjax.training.run_history import NEW_RUN, RunHistory
from stackjax.training.train_state import TrainState

_FIELDS = {
    "embed": "embed_dim",
    "mlp": "mlp_dim",
    "heads": "num_heads",
    "kv_heads": "num_kv_heads",
    "vocab": "vocab_size, padded to model.vocab_multiple,",
    "experts": "num_experts",
    "expert_mlp": "expert_dim",
}


_KERNEL_DEVICES = {"cudnn": "an NVIDIA GPU", "splash": "a TPU"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
    """A phase's memory on each device."""

    phase: Phase
    state: TrainState
    """Shapes, types and partitions."""
    state_bytes: int
    """Parameters and optimizer state on one device; without moments in the host's memory."""
    gradient_bytes: int
    """Gradients on one device: a microbatch's gradient, and the sum over microbatches."""


def check_backend(config: Config, device: DeviceKind | None = None) -> None:
    """Raises UserError if a run does not work on a device kind.

    Args:
      device: By default JAX's first device.
    """
    device = jax.devices()[0] if device is None else device
    platform = platform_of(device)
    if config.platform == "accelerator" and platform == "cpu":
        raise UserError(
            "platform is 'accelerator', but JAX has only the CPU here, on which this run would "
            "crawl; run it on a GPU or TPU (`pip install -r requirements-cuda.txt`, or "
            "`-tpu.txt`), or go on regardless with `--platform any`."
        )
    kernel = config.model.attention
    if kernel == "cudnn" and config.model.compute_dtype == "float32":
        raise UserError(
            "model.attention is 'cudnn', which takes bfloat16 alone, and model.compute_dtype "
            "is 'float32'; use bfloat16, or `--model.attention xla`."
        )
    if kernel != "auto" and not has_kernel(kernel, device):
        raise UserError(
            f"model.attention is {kernel!r}, which needs {_KERNEL_DEVICES[kernel]}, but JAX "
            f"runs on {platform} here; use `--model.attention auto`."
        )


def device_memory() -> int | None:
    """Returns the memory per device in bytes, if known."""
    statistics = jax.local_devices()[0].memory_stats() or {}
    return statistics.get("bytes_limit")


def check(
    config: Config,
    num_devices: int,
    memory: int | None = None,
    history: RunHistory = NEW_RUN,
    num_slices: int = 1,
) -> list[Estimate]:
    """Returns an estimate for each phase, without allocation.

    Args:
      num_devices: Device count for the run.
      memory: Memory per device in bytes, if known.
      history: The run's position.
      num_slices: Number of TPU slices, as in `mesh_shape`.

    Raises:
      UserError: A stage does not fit the mesh, batch or devices.
    """
    phases = expand(config, history)
    if history == NEW_RUN:
        _check_reached(config, phases)
    return [check_phase(config, phase, num_devices, memory, num_slices) for phase in phases]


def check_phase(
    config: Config,
    phase: Phase,
    num_devices: int,
    memory: int | None = None,
    num_slices: int = 1,
) -> Estimate:
    """Returns an estimate for one phase; arguments and errors as for `check`."""
    shape = mesh_shape(phase.mesh, num_devices, num_slices)
    axes = mesh_axes(phase.mesh)
    mesh = AbstractMesh(shape, axes, axis_types=(AxisType.Explicit,) * len(axes))
    with jax.sharding.use_abstract_mesh(mesh):
        _check_steps(phase)
        _check_batch(config, phase)
        _check_until(config, phase)
        _check_divides(phase)
        state = abstract_state(phase)
        _check_moments(phase, state)
    held = state if phase.moment_memory == "device" else state.params
    state_bytes = bytes_per_device(held, mesh)
    gradient_bytes = bytes_per_device(state.params, mesh) * (2 if phase.accumulate > 1 else 1)
    if memory is not None and state_bytes + gradient_bytes > memory:
        raise UserError(
            f"stages.{phase.stage}: parameters, optimizer state and gradients take "
            f"{(state_bytes + gradient_bytes) / 2**30:.1f} GiB on each device, which has "
            f"{memory / 2**30:.1f} GiB; use more devices, a larger mesh.fsdp, or on GPUs "
            f"--stages.{phase.stage}.moment-memory host."
        )
    return Estimate(
        phase=phase, state=state, state_bytes=state_bytes, gradient_bytes=gradient_bytes
    )


def _check_steps(phase: Phase) -> None:
    if phase.num_steps >= 2**31:
        raise UserError(
            f"stages.{phase.stage} has {phase.num_steps:.3g} steps of "
            f"{phase.per_step.tokens} tokens, and a step is counted in 32 bits; give it fewer "
            f"tokens, or a larger batch_size."
        )


def _check_batch(config: Config, phase: Phase) -> None:
    shards = num_shards("batch")
    rows = phase.accumulate * shards
    if phase.batch_size % rows:
        raise UserError(
            f"{phase.batch_field}.batch_size is {phase.batch_size}, which does not divide "
            f"into accumulate {phase.accumulate} x {shards} shards of the batch (mesh "
            f"{_mesh_axes('batch')}); use a multiple of {rows}."
        )
    context = num_shards("seq")
    if phase.seq_len % context:
        raise UserError(
            f"data.seq_len is {phase.seq_len} in stage {phase.stage}, which does not divide "
            f"over {context} shards of the sequence (mesh context); use a multiple of "
            f"{context}."
        )
    if config.evaluation.batch_size % shards:
        raise UserError(
            f"evaluation.batch_size is {config.evaluation.batch_size}, which does not "
            f"divide over {shards} shards of the batch; use a multiple of {shards}."
        )


def _check_until(config: Config, phase: Phase) -> None:
    """Raises UserError where a trigger fires at once, or on too few evaluations."""
    until, every = config.stages[phase.stage].until, config.evaluation.every_tokens
    spent = {"tokens": phase.start.tokens, "flops_6nd": phase.start.flops_6nd}
    for field, before in spent.items() if not phase.part else ():
        limit = getattr(until, field)
        if limit is not None and limit <= before:
            raise UserError(
                f"stages.{phase.stage}.until.{field} is {limit:.10g}, and the stages before it "
                f"take {before:.10g}; it counts from the start of the run, so give it more."
            )
    # Evaluations are made at the first step past a multiple.
    least = 2 * every + phase.per_step.tokens
    if until.slope_tokens is not None and until.slope_tokens < least:
        raise UserError(
            f"stages.{phase.stage}.until.slope_tokens is {until.slope_tokens}, and evaluations "
            f"are {every} tokens apart; a slope takes three of them, {least} tokens or more."
        )


def _check_reached(config: Config, phases: Sequence[Phase]) -> None:
    """Raises UserError for an early stop without effect, after the stage's end."""
    for stage, end in {phase.stage: phase.end for phase in phases}.items():
        for field in ("tokens", "flops_6nd"):
            limit, last = getattr(config.stages[stage].until, field), getattr(end, field)
            if limit is not None and limit >= last:
                raise UserError(
                    f"stages.{stage}.until.{field} is {limit:.10g}, which has no effect while "
                    f"the stage ends at {last:.10g} anyway; give it less, or leave it out."
                )


def _check_moments(phase: Phase, state: TrainState) -> None:
    """Raises UserError if the optimizer state cannot grow."""
    if phase.growth is None or phase.optimizer_state == "reset":
        return
    try:
        check_moments(state.opt_state, state.params)
    except UserError as error:
        field = f"stages.{phase.stage}.optimizer_state"
        raise UserError(f"{field} is {phase.optimizer_state!r}, but {error}") from None


def _check_divides(phase: Phase) -> None:
    for axis, field in _FIELDS.items():
        size, shards = axis_size(phase.model, axis), num_shards(axis)
        if size % shards:
            raise UserError(
                f"model.{field} is {size} in stage {phase.stage}, which does not divide "
                f"over {shards} shards (mesh {_mesh_axes(axis)}); change one of them."
            )


def _mesh_axes(axis: str) -> str:
    """Returns the mesh axes of a logical axis, for a message."""
    rule = RULES[axis]
    axes = (rule,) if isinstance(rule, str) else rule
    present = jax.sharding.get_abstract_mesh().shape
    return " x ".join(axis for axis in axes if axis in present)


def bytes_per_device(tree: object, mesh: AbstractMesh) -> int:
    """Returns the bytes per device for a tree with abstract arrays."""

    def leaf_bytes(leaf: jax.ShapeDtypeStruct) -> int:
        axes = jax.tree.leaves(tuple(partition_of(leaf)))
        shards = math.prod(mesh.shape[axis] for axis in axes)
        return leaf.size * jnp.dtype(leaf.dtype).itemsize // shards

    return sum(leaf_bytes(leaf) for leaf in jax.tree.leaves(tree))
