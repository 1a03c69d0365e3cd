"""Compiling what a phase runs, and keeping what was compiled for the next start."""

import functools

import jax
import jax.numpy as jnp
import optax
import zstandard
from etils import epath
from jax.sharding import Mesh

from stackjax import model
from stackjax.config import Config
from stackjax.data.batch import Batch
from stackjax.data.device import batch_sharding
from stackjax.optimizer import build_fit_optimizer, build_optimizer
from stackjax.phase import Phase
from stackjax.train_state import TrainState, init_state, train_step


def phase_optimizer(config: Config, phase: Phase) -> optax.GradientTransformation:
    """Returns the optimizer of a phase, without its learning rate."""
    if phase.name == "fit":
        return build_fit_optimizer(config.optimizer)
    return build_optimizer(config.optimizer, model.logical_axes(phase.model))


def new_state(config: Config, phase: Phase) -> TrainState:
    """Returns the state of a new model on the current mesh."""
    init = functools.partial(init_state, phase.model, phase_optimizer(config, phase))
    # It runs once. On a CPU the compiler takes 11 s over optimising the random numbers of
    # a tiny model, and 2 s without.
    options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    return jax.jit(init, compiler_options=options)(jax.random.key(config.seed))


def compile_step(
    config: Config, phase: Phase, state: TrainState, mesh: Mesh
) -> jax.stages.Compiled:
    """Returns a phase's train step, compiled: (state, batch) -> (state, metrics).

    The state is donated.
    """
    tx = phase_optimizer(config, phase)
    step = functools.partial(train_step, phase, tx, config.optimizer.z_loss)
    shape = (
        phase.accumulate,
        phase.batch_size // phase.accumulate,
        config.data.seq_len,
    )
    segments = jnp.int32 if config.data.mask_documents else None
    dtypes = Batch(jnp.int32, jnp.int32, segments, jnp.float32)
    sharding = batch_sharding(mesh)
    batch = jax.tree.map(lambda d: jax.ShapeDtypeStruct(shape, d, sharding=sharding), dtypes)
    return jax.jit(step, donate_argnums=0).lower(state, batch).compile()


def use_compilation_cache(workdir: epath.Path) -> None:
    """Keeps compiled programs in the run directory, or where JAX is already told to.

    JAX writes entries in place, so a killed run may leave half of one, which it would
    warn of at every start and never write again: such entries are removed.
    """
    stated = jax.config.jax_compilation_cache_dir  # type: ignore
    directory = epath.Path(stated or workdir / "compilation_cache")
    jax.config.update("jax_compilation_cache_dir", str(directory))
    for entry in directory.glob("*-cache") if directory.exists() else ():
        if not _is_whole(entry.read_bytes()):
            entry.unlink(missing_ok=True)


def _is_whole(entry: bytes) -> bool:
    try:
        zstandard.decompress(entry)
    except zstandard.ZstdError:
        return False
    return True
