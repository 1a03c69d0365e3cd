"""Growth under CompleteP, which gives source and target different factors."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax

from stackjax.growth.values import part_of
from stackjax.model.config import ModelConfig
from stackjax.model.parametrization import branch_factor, fold_factor, scaled
from stackjax.sharding.axes import Axes

if TYPE_CHECKING:
    from stackjax.growth.base import Growth, Order


def grow_params(
    growth: Growth,
    params: Any,
    axes: Any,
    source: ModelConfig,
    *,
    key: jax.Array,
    fresh: Callable[[ModelConfig], Any],
) -> Any:
    """Returns `growth.grow_params`, of folded parameters if the operator grows these.

    Args:
      fresh: Returns all initial parameters of a config.
    """

    def fresh_part(config: ModelConfig) -> Any:
        return part_of(fresh(config), growth.target_tree(params, source))

    if source.completep is None or not growth.grows_folded:
        return growth.grow_params(params, axes, source, key=key, fresh=fresh_part)
    target = growth.target_axes(axes, source)
    grown = growth.grow_params(
        fold(params, axes, source),
        axes,
        source,
        key=key,
        fresh=lambda config: fold(fresh_part(config), target, config),
    )
    return fold(grown, target, growth.target_config(source), power=-1)


def grow_moment(
    growth: Growth, moment: Any, axes: Any, source: ModelConfig, *, order: Order
) -> Any:
    """Returns `growth.grow_moment`, times the factor's change in the gradient.

    Copied layers with a branch factor g times as small have gradients g times as small, up to
    terms of second order in the size of branches.
    """
    if source.completep is None or order == 0:
        return growth.grow_moment(moment, axes, source, order=order)
    target = growth.target_config(source)
    if growth.grows_folded:
        moment = fold(moment, axes, source, power=-order)
        grown = growth.grow_moment(moment, axes, source, order=order)
        return fold(grown, growth.target_axes(axes, source), target, power=order)
    change = (branch_factor(target) / branch_factor(source)) ** order

    def change_layers(leaf: jax.Array, names: Axes) -> jax.Array:
        return scaled(leaf, change) if names.layer_axis else leaf

    grown = growth.grow_moment(moment, axes, source, order=order)
    return jax.tree.map(change_layers, grown, growth.target_axes(axes, source))


def fold(params: Any, axes: Any, config: ModelConfig, power: int = 1) -> Any:
    """Returns parameters of the standard model with the same function as under CompleteP.

    Args:
      params: All parameters, or any part of the tree.
      axes: The `Axes` of each parameter.
      power: -1 for the inverse; for moments, the exponent of the factor.
    """

    def change(leaf: jax.Array, names: Axes) -> jax.Array:
        return scaled(leaf, fold_factor(config, names) ** power)

    return jax.tree.map(change, params, axes)
