"""Compiling what a phase runs, and keeping what was compiled for the next start."""

import functools
import os
from typing import Any

import jax
import jax.numpy as jnp
import optax
import zstandard
from etils import epath
from jax.sharding import Mesh

from stackjax import model
from stackjax.config import Config, OptimizerConfig
from stackjax.data.batch import Batch
from stackjax.data.device import batch_sharding
from stackjax.files.storage import check_bucket, is_remote
from stackjax.model import ModelConfig
from stackjax.model.config import axis_size
from stackjax.sharding.mesh import build_mesh
from stackjax.sharding.partition import on_mesh, partition
from stackjax.training.compiler_options import COMPILER_OPTIONS
from stackjax.training.optimizer import build_fit_optimizer, build_optimizer
from stackjax.training.phase import Phase
from stackjax.training.train_state import TrainState, fit_state, init_state, train_step


def phase_optimizer(config: Config, phase: Phase) -> optax.GradientTransformation:
    """Returns the optimizer of a phase, without its learning rate."""
    if phase.name == "fit":
        return build_fit_optimizer(config.optimizer)
    return build_optimizer(config.optimizer, model.logical_axes(phase.model), phase.births)


def growth_key(config: Config, phase: Phase) -> jax.Array:
    """Returns the randomness of the growth into a phase."""
    return jax.random.fold_in(jax.random.key(config.seed), phase.index)


def new_state(config: Config, phase: Phase) -> TrainState:
    """Returns the state of a new model on the current mesh."""
    init = functools.partial(init_state, phase.model, phase_optimizer(config, phase))
    # It runs once. On a CPU the compiler takes 11 s over optimising the random numbers of
    # a tiny model, and 2 s without.
    options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    return jax.jit(init, compiler_options=options)(jax.random.key(config.seed))


def abstract_state(config: Config, phase: Phase) -> TrainState:
    """Returns shapes, types and partitions of a phase's state on the current mesh."""
    tx = phase_optimizer(config, phase)

    def state() -> TrainState:
        key = jax.random.key(0)
        if phase.name == "fit":
            return fit_state(phase, tx, model.init(phase.source, key), key)
        return init_state(phase.model, tx, key)

    return jax.eval_shape(state)


def abstract_part(
    config: ModelConfig, optimizer: OptimizerConfig | None, axes: Any
) -> TrainState:
    """Returns shapes, types and partitions of the state of some parameters of a model.

    Args:
      optimizer: None leaves its state out.
      axes: The `Axes` of the parameters.
    """

    def state() -> TrainState:
        params = jax.tree.map(
            lambda names: jnp.zeros(
                tuple(axis_size(config, name) for name in names.names),
                out_sharding=partition(names),
            ),
            axes,
        )
        opt_state = None if optimizer is None else build_optimizer(optimizer, axes).init(params)
        return TrainState(jnp.zeros((), jnp.int32), params, opt_state)

    return jax.eval_shape(state)


def jit_step(config: Config, phase: Phase) -> Any:
    """Returns a phase's train step, jitted: (state, batch) -> (state, metrics).

    The state is donated.
    """
    tx = phase_optimizer(config, phase)
    step = functools.partial(train_step, phase, tx, config.optimizer.z_loss)
    return jax.jit(step, donate_argnums=0)


def abstract_batch(config: Config, phase: Phase, mesh: Mesh) -> Batch:
    """Returns shapes, types and layout of what the step of a phase reads."""
    rows = phase.batch_size // phase.accumulate
    shape = (phase.accumulate, rows, config.data.seq_len)
    sharding = batch_sharding(mesh)
    segments = jnp.int32 if config.data.mask_documents else None
    dtypes = Batch(jnp.int32, jnp.int32, segments, jnp.float32)
    return jax.tree.map(lambda d: jax.ShapeDtypeStruct(shape, d, sharding=sharding), dtypes)


def compile_step(config: Config, phase: Phase) -> jax.stages.Compiled:
    """Returns `jit_step`, compiled for the mesh of the phase."""
    mesh = build_mesh(phase.mesh)
    # Threads do not inherit the mesh.
    with jax.set_mesh(mesh):
        state = on_mesh(abstract_state(config, phase), mesh)
        lowered = jit_step(config, phase).lower(state, abstract_batch(config, phase, mesh))
        return lowered.compile(COMPILER_OPTIONS.get(jax.default_backend()))


def use_compilation_cache(workdir: epath.Path) -> None:
    """Keeps compiled programs in the run directory, or where JAX is already told to.

    On a disk JAX writes entries in place, so a killed run may leave half of one, which it
    would warn of at every start and never write again: such entries are removed.

    Raises:
      UserError: The environment names a place of an unknown kind.
      OSError: The directory cannot be written.
    """
    stated = jax.config.jax_compilation_cache_dir  # type: ignore
    check_bucket(stated or "")  # that of the run is checked already
    directory = epath.Path(stated or workdir / "compilation_cache")
    jax.config.update("jax_compilation_cache_dir", str(directory))
    if is_remote(directory):
        # XLA would put its cache of autotuning there too, which it cannot.
        jax.config.update("jax_persistent_cache_enable_xla_caches", "none")
        return
    _make_writable(directory)
    for entry in directory.glob("*-cache"):
        if not _is_whole(entry.read_bytes()):
            entry.unlink(missing_ok=True)


def _make_writable(directory: epath.Path) -> None:
    """Makes the directory of the cache; OSError if nothing can be written there."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if not os.access(directory, os.W_OK):
            raise PermissionError("it may not be written to")
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
