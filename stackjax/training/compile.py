"""Compiled train steps, and the compilation cache."""

import contextlib
import functools
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
import zstandard
from etils import epath
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from stackjax import model
from stackjax.config import Config
from stackjax.data.batch import Batch
from stackjax.data.device import batch_sharding
from stackjax.files.storage import check_bucket, is_remote
from stackjax.model import ModelConfig
from stackjax.model.config import shape_of
from stackjax.model.parametrization import all_ratios
from stackjax.optimizers import Optimizer
from stackjax.sharding.mesh import build_mesh
from stackjax.sharding.partition import on_mesh, partition
from stackjax.sharding.platform import platform_of, target_device
from stackjax.training.compiler_options import COMPILER_OPTIONS
from stackjax.training.phase import Phase, StepInputs
from stackjax.training.spikes import SpikeInputs, spike_inputs
from stackjax.training.train_state import (
    TrainState,
    enter_phase,
    fit_state,
    init_state,
    placed,
    train_step,
)

_PROGRAMS = 4
"""Jitted functions to keep, with their compiled programs, for phases with equal programs."""


def phase_optimizer(phase: Phase) -> optax.GradientTransformationExtraArgs:
    """Returns a phase's optimizer, without learning rate."""
    if phase.fit is not None:
        return fit_transformation(phase.optimizer)
    axes = model.logical_axes(phase.model)
    if phase.model.has_factors:
        tx = phase.optimizer.build_scaled(axes, all_ratios(phase.model, axes))
    else:
        tx = phase.optimizer.build(axes)
    return optax.with_extra_args_support(tx)


def fit_transformation(optimizer: Optimizer) -> optax.GradientTransformationExtraArgs:
    """Returns the optimizer for the maps of a learned growth; the source stays fixed."""
    labels = {"maps": "fitted", "source": "fixed"}
    return optax.partition(
        {"fitted": optimizer.build_fit(), "fixed": optax.set_to_zero()}, labels
    )


def growth_key(config: Config, phase: Phase) -> jax.Array:
    """Returns the random key for the growth into a phase."""
    return jax.random.fold_in(jax.random.key(config.seed), phase.index)


def new_state(config: Config, phase: Phase) -> TrainState:
    """Returns a new model's state on the current mesh."""
    return _jit_init(phase.program, platform_of(target_device()))(jax.random.key(config.seed))


@functools.lru_cache(_PROGRAMS)
def _jit_init(program: Phase, platform: str) -> Any:
    init = functools.partial(init_state, program.model, phase_optimizer(program))
    # This runs once. For a tiny model on a CPU, optimized compilation takes 11 s, and
    # unoptimized compilation 2 s.
    options = {"xla_backend_optimization_level": 0} if platform == "cpu" else None
    return jax.jit(init, compiler_options=options)


def abstract_state(phase: Phase) -> TrainState:
    """Returns a phase's state on the current mesh, abstract: shapes, types and partitions."""
    return jax.eval_shape(_state_of(phase.program))


@functools.lru_cache(_PROGRAMS)
def _state_of(program: Phase) -> Callable[[], TrainState]:
    """Returns the function that makes a phase's state."""
    tx = phase_optimizer(program)

    def state() -> TrainState:
        key = jax.random.key(0)
        if program.fit is not None:
            params = model.init(program.source, key)
            return fit_state(program.fit, program.source, tx, params, key)
        return init_state(program.model, tx, key)

    return state


def abstract_part(config: ModelConfig, optimizer: Optimizer | None, axes: Any) -> TrainState:
    """Returns an abstract state for some parameters: shapes, types and partitions.

    Args:
      optimizer: None for a state without optimizer.
      axes: The `Axes` of these parameters.
    """

    def state() -> TrainState:
        params = jax.tree.map(
            lambda names: jnp.zeros(shape_of(config, names), out_sharding=partition(names)),
            axes,
        )
        opt_state = None if optimizer is None else optimizer.build(axes).init(params)
        return TrainState(jnp.zeros((), jnp.int32), params, opt_state)

    return jax.eval_shape(state)


def jit_step(phase: Phase, tx: optax.GradientTransformationExtraArgs | None = None) -> Any:
    """Returns a phase's train step, jitted: (inputs, state, batch) -> (state, metrics).

    The state is donated. Phases with equal programs share the step: learning rate, tokens and
    moment starts are inputs.

    Args:
      tx: An optimizer without learning rate, instead of the config's.
    """
    return _shared_step(phase.program) if tx is None else _jit_step(phase.program, tx)


@functools.lru_cache(_PROGRAMS)
def _shared_step(program: Phase) -> Any:
    return _jit_step(program, phase_optimizer(program))


def _jit_step(program: Phase, tx: optax.GradientTransformationExtraArgs) -> Any:
    step = functools.partial(train_step, program, tx, program.optimizer.z_loss)
    return jax.jit(step, donate_argnums=1)


def jit_growth(
    source: Phase,
    target: Phase,
    tx: optax.GradientTransformationExtraArgs | None = None,
    *,
    donate: bool = False,
) -> Any:
    """Returns the growth from a phase to the next, jitted: (state, key) -> state.

    Args:
      tx: The target's optimizer without learning rate, instead of the config's.
      donate: Whether the source state may be overwritten.
    """
    tx = phase_optimizer(target) if tx is None else tx
    enter = functools.partial(enter_phase, source, target, tx)
    return jax.jit(enter, donate_argnums=0 if donate else ())


@contextlib.contextmanager
def partial_donation() -> Iterator[None]:
    """Silences JAX's warning about donated buffers that no result can reuse."""
    with warnings.catch_warnings():
        # JAX can reuse only buffers with equal shapes.
        warnings.filterwarnings("ignore", "Some donated buffers were not usable")
        yield


def abstract_batch(config: Config, phase: Phase, mesh: Mesh) -> Batch:
    """Returns the abstract batch for a phase's step: shapes, types and layout."""
    rows = phase.batch_size // phase.accumulate
    shape = (phase.accumulate, rows, phase.seq_len)
    sharding = batch_sharding(mesh)
    segments = jnp.int32 if config.data.mask_documents else None
    dtypes = Batch(jnp.int32, jnp.int32, segments, jnp.float32)
    return jax.tree.map(lambda d: jax.ShapeDtypeStruct(shape, d, sharding=sharding), dtypes)


def step_inputs(phase: Phase, spikes: SpikeInputs | None = None) -> StepInputs:
    """Returns a phase's step inputs, on every device of the mesh."""
    inputs = phase.step_inputs._replace(spikes=spikes)
    return jax.device_put(inputs, NamedSharding(build_mesh(phase.mesh), P()))


def compile_step(
    config: Config, phase: Phase, devices: Sequence[jax.Device] | None = None
) -> jax.stages.Compiled:
    """Returns `jit_step`, compiled for the phase's mesh.

    Args:
      devices: The mesh's devices, such as described devices of another machine; by default all
        devices of the run.
    """
    mesh = build_mesh(phase.mesh, devices)
    # Threads do not inherit the mesh.
    with jax.set_mesh(mesh):
        spikes = spike_inputs(config.spikes, None)
        inputs = phase.step_inputs._replace(spikes=spikes)
        inputs = on_mesh(jax.eval_shape(lambda: inputs), mesh)
        state = placed(phase, on_mesh(abstract_state(phase), mesh))
        batch = abstract_batch(config, phase, mesh)
        lowered = jit_step(phase).lower(inputs, state, batch)
        return lowered.compile(COMPILER_OPTIONS.get(platform_of(target_device())))


def clear_programs() -> None:
    """Drops all shared functions and programs, so that the next compilation starts anew."""
    for shared in (_jit_init, _state_of, _shared_step):
        shared.cache_clear()


def use_compilation_cache(workdir: epath.Path) -> None:
    """Turns on the compilation cache, in the run directory or JAX's configured directory.

    JAX writes cache entries in place. An entry cut off by a kill would cause a warning at every
    start and never be rewritten, so incomplete entries are removed.

    Raises:
      UserError: The environment names an unsupported path.
      OSError: The directory is not writable.
    """
    stated = jax.config.jax_compilation_cache_dir  # type: ignore
    check_bucket(stated or "")  # the run directory was checked before
    directory = epath.Path(stated or workdir / "compilation_cache")
    jax.config.update("jax_compilation_cache_dir", str(directory))
    if is_remote(directory):
        # XLA cannot write an autotuning cache to a bucket.
        jax.config.update("jax_persistent_cache_enable_xla_caches", "none")
        return
    _make_writable(directory)
    for entry in directory.glob("*-cache"):
        # Another run with the same cache may remove an entry at the same time.
        with contextlib.suppress(FileNotFoundError):
            if not _is_whole(entry.read_bytes()):
                entry.unlink()


def _make_writable(directory: epath.Path) -> None:
    """Creates the cache directory; OSError if the directory is not writable."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if not os.access(directory, os.W_OK):
            raise PermissionError("no write permission")
    except OSError as error:
        raise OSError(
            f"the compilation cache {directory} cannot be used ({error}); name another "
            f"directory with JAX_COMPILATION_CACHE_DIR."
        ) from error


def _is_whole(entry: bytes) -> bool:
    try:
        zstandard.decompress(entry)
    except zstandard.ZstdError:
        return False
    return True
