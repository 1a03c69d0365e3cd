"""Growth of a state, one parameter after another."""

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from stackjax import model
from stackjax.checkpoint.checksums import by_path
from stackjax.growth import Growth, grow_opt_state
from stackjax.model import ModelConfig, Params
from stackjax.optimizers import Optimizer
from stackjax.runtime.errors import not_finite
from stackjax.sharding.partition import auto_sharded, partition_of
from stackjax.training.compile import abstract_part
from stackjax.training.train_state import TrainState


def grow_by_parts(
    growth: Growth,
    source: ModelConfig,
    optimizer: Optimizer | None,
    load: Callable[[TrainState], TrainState],
    key: jax.Array,
    moments: Literal["grow", "keep"] = "grow",
) -> TrainState:
    """Returns the state at step 0 of the grown model, made one parameter at a time.

    Bit for bit what `grow_state` makes of all of them at once.

    Args:
      source: The config of the model that grows.
      optimizer: The optimizer whose state grows with the parameters; None leaves it out.
      load: Returns a part of the source's state, given its shapes, types and partitions.
      key: Randomness of the operator.
      moments: What becomes of the optimizer state.
    """
    axes, target = model.logical_axes(source), growth.target_config(source)
    grown: dict[str, jax.Array] = {}
    for path, _ in jax.tree_util.tree_leaves_with_path(axes):
        part = _only(axes, path)
        layout = jax.tree.map(partition_of, abstract_part(target, optimizer, part))
        grow_fn = functools.partial(grow_part, growth, source, part, layout, moments=moments)
        state = jax.jit(grow_fn)(load(abstract_part(source, optimizer, part)), key)
        # Waited for, so that the parameter of the source is free before the next is read.
        grown |= by_path(jax.block_until_ready(state))
    whole = abstract_part(target, optimizer, axes)
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


def grow_part(
    growth: Growth,
    source: ModelConfig,
    axes: Any,
    layout: TrainState,
    state: TrainState,
    key: jax.Array,
    *,
    moments: Literal["grow", "keep"],
) -> TrainState:
    """Returns the state at step 0 of some of the grown model's parameters.

    Args:
      axes: The `Axes` of these parameters.
      layout: The partitions of what it returns.
      state: The source's state of these parameters.
    """

    def grow_params(params: Params, key: jax.Array) -> Params:
        grow_key, fresh_key = jax.random.split(key)

        def fresh(config: ModelConfig) -> Params:
            whole = model.init(config, fresh_key)
            ((path, _),) = jax.tree_util.tree_leaves_with_path(axes)
            return _only(whole, path)

        return growth.grow_params(params, axes, source, key=grow_key, fresh=fresh)

    def grow_moments(opt_state: Any) -> Any:
        return grow_opt_state(growth, opt_state, axes, source, mode=moments)

    # Operators are free of layouts: inside, the compiler finds them.
    params = auto_sharded(grow_params, layout.params)(state.params, key)
    opt_state = state.opt_state
    if opt_state is not None:
        opt_state = auto_sharded(grow_moments, layout.opt_state)(opt_state)
    return TrainState(jnp.zeros((), jnp.int32), params, opt_state)


def _only(tree: Any, path: Any) -> Any:
    """Returns nested dicts that hold nothing but what is at a path."""
    name, *rest = path
    return {name.key: _only(tree[name.key], rest) if rest else tree[name.key]}
