"""Growth of a checkpoint's state, parameter by parameter."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from stackjax import model
from stackjax.checkpoint.checksums import by_path
from stackjax.growth import Growth, OptimizerState
from stackjax.growth.grow_tree import split_tree
from stackjax.model import ModelConfig
from stackjax.optimizers import Optimizer
from stackjax.runtime.errors import not_finite
from stackjax.training.compile import abstract_part
from stackjax.training.train_state import TrainState, grow_state


def grow_by_parts(
    growth: Growth,
    source: ModelConfig,
    optimizer: Optimizer | None,
    load: Callable[[TrainState], TrainState],
    key: jax.Array,
    optimizer_state: OptimizerState,
) -> TrainState:
    """Returns the state at step 0 of the grown model, grown parameter by parameter.

    The result is bit for bit the result of `grow_state` for the whole state.

    Args:
      source: The config of the source model.
      optimizer: The optimizer of the checkpoint; None leaves the optimizer state out.
      load: Returns a part of the source state from shapes, types and partitions.
      key: Randomness of the operator.
      optimizer_state: Growth of the optimizer state.
    """
    axes, target = model.logical_axes(source), growth.target_config(source)
    grown: dict[str, jax.Array] = {}
    for part in split_tree(axes):
        tx = None
        if optimizer is not None:
            tx = optimizer.build(growth.target_axes(part, source))
        grow = functools.partial(
            grow_state, growth, source, tx, optimizer_state=optimizer_state
        )
        state = jax.jit(grow)(load(abstract_part(source, optimizer, part)), key=key)
        # Wait: the source parameter is free before the next parameter is read.
        grown |= by_path(jax.block_until_ready(state))
    whole = abstract_part(target, optimizer, growth.target_axes(axes, source))
    return jax.tree_util.tree_map_with_path(
        lambda path, _: grown[jax.tree_util.keystr(path, simple=True, separator=".")], whole
    )


def check_finite(state: TrainState, where: str) -> None:
    """Raises UserError if an array of a state holds NaN or infinity.

    Args:
      where: The checkpoint, for errors.
    """
    for path, leaf in by_path(state).items():
        if jnp.issubdtype(leaf.dtype, jnp.inexact) and not _is_finite(leaf):
            raise not_finite(path, where, leaf.dtype.name)


@jax.jit
def _is_finite(array: jax.Array) -> jax.Array:
    return jnp.isfinite(array).all()
