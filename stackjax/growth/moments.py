"""How the state of an optimizer grows with the parameters."""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from stackjax.growth.axis_map import zero_new
from stackjax.growth.base import Growth, Order
from stackjax.model.config import ModelConfig, axis_size
from stackjax.sharding.axes import Axes


def grow_opt_state(
    growth: Growth,
    opt_state: Any,
    axes: Any,
    source: ModelConfig,
    mode: Literal["grow", "keep"] = "grow",
) -> Any:
    """Returns an optax state whose moments have grown; types and step counts are kept.

    Args:
      axes: The `Axes` of each parameter.
      source: The config of the model that is growing.
      mode: `grow` multiplies moments by the gradient's factor and its square; `keep` leaves
        those of old entries as they are, and zeroes those of new ones.
    """

    def grow_whole(moment: Any, order: Order) -> Any:
        if mode == "grow":
            return growth.grow_moment(moment, axes, source, order=order)
        copies = growth.grow_moment(moment, axes, source, order=0)
        return zero_new(copies, axes, growth.axis_maps(source))

    def grow_present(moment: Any, order: Order) -> Any:
        # A tree leaves out what another optimizer takes care of.
        def whole(leaf: Any, names: Axes) -> Any:
            shape = tuple(axis_size(source, name) for name in names.names)
            return jnp.zeros(shape) if _is_absent(leaf) else _widened(leaf)

        filled = jax.tree.map(whole, moment, axes, is_leaf=_is_absent)
        return jax.tree.map(
            lambda leaf, grown: leaf if _is_absent(leaf) else grown.astype(leaf.dtype),
            moment,
            grow_whole(filled, order),
            is_leaf=_is_absent,
        )

    return _map_moments(grow_present, opt_state)


def zero_where(is_zeroed: Any, opt_state: Any) -> Any:
    """Returns an optax state whose moments begin at zero in some entries.

    Args:
      is_zeroed: Booleans for each parameter, which broadcast against it.
    """

    def zero(moment: Any, _: Order) -> Any:
        return jax.tree.map(
            lambda leaf, zeroed: leaf if _is_absent(leaf) else jnp.where(zeroed, 0, leaf),
            moment,
            is_zeroed,
            is_leaf=_is_absent,
        )

    return _map_moments(zero, opt_state)


def _map_moments(function: Callable[[Any, Order], Any], opt_state: Any) -> Any:
    """Returns a state with `function(moments, order)` in place of each tree of moments.

    Raises:
      TypeError: The state has other arrays, and nothing says how they grow.
    """

    def apply(node: Any) -> Any:
        if isinstance(node, optax.ScaleByAdamState):
            return node._replace(mu=function(node.mu, 1), nu=function(node.nu, 2))
        if isinstance(node, optax.contrib.MuonState):
            return node._replace(mu=function(node.mu, 1))
        raise TypeError(
            f"the state of an optimizer holds {node}, which is neither Adam's nor Muon's; "
            f"stackjax.growth.moments has to say what becomes of it."
        )

    return jax.tree.map(apply, opt_state, is_leaf=_has_moments)


def _widened(moment: jax.Array) -> jax.Array:
    """Returns a moment in a type to compute in."""
    return moment.astype(jnp.promote_types(moment.dtype, jnp.float32))


def _has_moments(node: Any) -> bool:
    return isinstance(node, optax.ScaleByAdamState | optax.contrib.MuonState)


def _is_absent(node: Any) -> bool:
    return isinstance(node, optax.MaskedNode)
