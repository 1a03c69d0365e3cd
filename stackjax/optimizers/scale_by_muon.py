"""Muon as optax transformations."""

import functools
import math
from typing import Any

import jax
import optax
import optax.contrib

from stackjax.optimizers.muon import Muon
from stackjax.optimizers.scale_by_adam import (
    is_masked,
    map_axes,
    scale_by_adam,
    store_moments,
    with_clip_and_decay,
)
from stackjax.sharding.axes import Axes
from stackjax.sharding.partition import auto_sharded, partition_of


def muon(config: Muon, axes: Any, ratios: Any = None) -> optax.GradientTransformation:
    """Returns clipping, Muon and Adam, and weight decay for matrices only.

    Args:
      ratios: The `Ratios` of each parameter, for CompleteP.
    """
    scale = _scale_by_muon(config, axes, ratios)
    return with_clip_and_decay(config, scale, axes, ratios)


def _scale_by_muon(
    config: Muon, axes: Any, ratios: Any
) -> optax.GradientTransformationExtraArgs:
    """Returns Muon (arXiv:2502.16982) for matrices in layers, Adam for other parameters.

    With momentum m = beta m + (1 - beta) g, the update t (from 1) orthogonalizes Nesterov's
    beta m / (1 - beta^(t + 1)) + (1 - beta) g / (1 - beta^t), with NAdam's bias corrections.
    The code by Keller Jordan and the paper have no bias correction, so their first updates give
    the newest gradient less weight. For large t the directions are equal.
    """
    matrices, epsilon = map_axes(_matrix_dimensions, axes), config.epsilon
    if ratios is not None:
        epsilon /= jax.tree.leaves(ratios)[0].layers

    def as_large_as_adam(
        update: jax.Array, matrix: optax.contrib.MuonDimensionNumbers
    ) -> jax.Array:
        sides: Any = (matrix.reduction_axis, matrix.output_axis)
        fans = (math.prod(update.shape[axis] for axis in side) for side in sides)
        return 0.2 * math.sqrt(max(fans)) * update

    muon = optax.chain(
        store_moments(_momentum(config, axes, matrices, epsilon), config.moments_dtype),
        optax.stateless(lambda updates, _: jax.tree.map(as_large_as_adam, updates, matrices)),
    )
    tx = optax.partition(
        {"muon": muon, "adam": scale_by_adam(config, axes, ratios)},
        map_axes(lambda names: "muon" if names.stacked and names.reads else "adam", axes),
    )

    def update(
        updates: Any, state: Any, params: Any = None, *, moment_starts: Any = None
    ) -> tuple[Any, Any]:
        def step(updates: Any, state: Any, params: Any, moment_starts: Any) -> tuple[Any, Any]:
            return tx.update(updates, state, params, moment_starts=moment_starts)

        # Muon reshapes arrays to matrices, and only the compiler can find their layout.
        layout = jax.tree.map(lambda x: partition_of(jax.typeof(x)), (updates, state))
        return auto_sharded(step, layout)(updates, state, params, moment_starts)

    return optax.GradientTransformationExtraArgs(tx.init, update)


def _matrix_dimensions(names: Axes) -> optax.contrib.MuonDimensionNumbers | optax.MaskedNode:
    """Returns the axes for Muon; a masked node for parameters without a matrix per layer."""
    if not names.stacked or not names.reads:
        return optax.MaskedNode()
    place = names.names.index
    # Fused matrices are orthogonalized separately, like layers.
    writes = tuple(place(name) for name in names.writes)
    reads = tuple(place(name) for name in names.reads)
    return optax.contrib.MuonDimensionNumbers(reduction_axis=reads, output_axis=writes)


def _momentum(
    config: Muon, axes: Any, matrices: Any, epsilon: float
) -> optax.GradientTransformationExtraArgs:
    """Returns Muon's orthogonalized momentum."""
    scale = functools.partial(
        optax.contrib.scale_by_muon, eps=epsilon, weight_dimension_numbers=matrices
    )
    beta = config.momentum
    momentum = scale(beta=beta, nesterov=True)
    orthogonalize = scale(beta=0.0, nesterov=False)

    def update(
        updates: Any, state: Any, params: Any = None, *, moment_starts: Any = None
    ) -> tuple[Any, Any]:
        found, state = momentum.update(updates, state, params)
        if moment_starts is None:
            return found, state

        def ahead(grad: Any, mu: Any, names: Axes) -> Any:
            if is_masked(grad):
                return grad
            next_one = moment_starts.correction(names, beta, state.count + 1)
            this_one = moment_starts.correction(names, beta, state.count)
            return beta * mu / next_one + (1 - beta) * grad / this_one

        found = jax.tree.map(ahead, updates, state.mu, axes, is_leaf=is_masked)
        found, _ = orthogonalize.update(found, state, params)
        return found, state

    return optax.GradientTransformationExtraArgs(momentum.init, update)
