"""Router biases: updates without a gradient, by the experts' loads (arXiv:2408.15664)."""

from typing import Any

import jax
import jax.numpy as jnp

from stackjax.model import logical_axes
from stackjax.model.router import RouterSums
from stackjax.sharding.axes import Axes
from stackjax.training.phase import Phase


def with_balanced_biases(phase: Phase, params: Any, sums: RouterSums) -> Any:
    """Returns parameters whose router biases have moved by one step toward equal loads.

    Below the layer's mean load, an expert's bias rises by `bias_rate`; above, it falls. Frozen
    layers' biases stay, as do all biases in a fit.
    """
    routing = phase.model.routing
    if not phase.model.num_experts or phase.fit is not None:
        return params
    if routing is None or routing.balance != "bias":
        return params
    load_LE = jnp.sum(
        sums.load_LE.reshape(phase.model.loops, -1, phase.model.num_experts), axis=0
    )
    move_LE = routing.bias_rate * jnp.sign(jnp.mean(load_LE, -1, keepdims=True) - load_LE)
    axes = logical_axes(phase.model)
    is_frozen = jax.tree.map(lambda _: False, params)
    if phase.trained_layers is not None:
        is_frozen = phase.frozen()

    def step(leaf: jax.Array, names: Axes, is_frozen: Any) -> jax.Array:
        if names.reads or names.writes != ("routes",):
            return leaf
        return leaf + jnp.where(is_frozen, 0, move_LE.astype(leaf.dtype))

    return jax.tree.map(step, params, axes, is_frozen)
