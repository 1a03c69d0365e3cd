"""Growth for optimizer states."""

import itertools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from stackjax.growth.axis_map import zero_new
from stackjax.growth.base import Growth, Order
from stackjax.model.config import ModelConfig, shape_of
from stackjax.runtime.errors import UserError
from stackjax.sharding.axes import Axes

_ORDERS: dict[type, dict[str, Order]] = {
    optax.ScaleByAdamState: {"mu": 1, "nu": 2},
    optax.contrib.MuonState: {"mu": 1},
    optax.ScaleByLionState: {"mu": 1},
    optax.ScaleByRmsState: {"nu": 2},
    optax.TraceState: {"trace": 1},
}
"""The moments' order in each field, by known state."""


def grow_opt_state(
    growth: Growth,
    opt_state: Any,
    axes: Any,
    source: ModelConfig,
    moments: Literal["grow", "keep"] = "grow",
) -> Any:
    """Returns an optax state with grown moments; types, counts and other scalars are kept.

    Args:
      axes: The `Axes` of each parameter.
      source: The model's config before growth.
      moments: `grow` multiplies moments by the gradient's factor and by the square; `keep`
        keeps the moments of old entries, and zeroes the moments of new entries.

    Raises:
      UserError: The state has an array with unknown growth.
    """

    def grow_whole(moment: Any, order: Order) -> Any:
        if moments == "grow":
            return growth.target_moment(moment, axes, source, order=order)
        copies = growth.target_moment(moment, axes, source, order=0)
        target = growth.target_axes(axes, source)
        return zero_new(copies, target, growth.axis_maps(source))

    def grow_present(moment: Any, order: Order) -> Any:
        # Another optimizer updates this parameter.
        def whole(leaf: Any, names: Axes) -> Any:
            return jnp.zeros(shape_of(source, names)) if _is_absent(leaf) else _widened(leaf)

        filled = jax.tree.map(whole, moment, axes, is_leaf=_is_absent)
        return jax.tree.map(
            lambda leaf, grown: leaf if _is_absent(leaf) else grown.astype(leaf.dtype),
            growth.target_tree(moment, source),
            grow_whole(filled, order),
            is_leaf=_is_absent,
        )

    return _map_moments(grow_present, opt_state)


def zero_where(is_zeroed: Any, opt_state: Any) -> Any:
    """Returns an optax state with some moment entries set to zero.

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


def register_moments(state: type, **orders: Order) -> None:
    """Adds an optax state to the known types, for example from a config file.

        register_moments(optax.ScaleByBeliefState, mu=1, nu=2)

    Args:
      state: The type, a NamedTuple.
      orders: The moments' order in each field: 1 for averaged gradients, 2 for averaged squared
        gradients. Moments have the shapes of the parameters.
    """
    _ORDERS[state] = orders


def check_moments(opt_state: Any, params: Any) -> None:
    """Raises UserError if a state, perhaps abstract, has an array with unknown growth.

    Args:
      params: The parameters, perhaps abstract. A moment has its parameter's shape.
    """
    shapes = [leaf.shape for leaf in jax.tree.leaves(params)]

    def check(moment: Any, _: Order) -> Any:
        leaves = jax.tree.leaves(moment, is_leaf=_is_absent)
        for leaf, shape in itertools.zip_longest(leaves, shapes):
            if not _is_absent(leaf) and getattr(leaf, "shape", None) != shape:
                raise UserError(
                    f"the optimizer state has a moment of shape {getattr(leaf, 'shape', None)} "
                    f"for a parameter of shape {shape}; growth needs equal shapes, so set "
                    f"optimizer_state to 'reset'."
                )
        return moment

    _map_moments(check, opt_state)


def _map_moments(function: Callable[[Any, Order], Any], opt_state: Any) -> Any:
    """Returns a state with `function(moments, order)` in place of all moments.

    Raises:
      UserError: The state has an array that is no known moment.
    """

    def apply(path: Any, node: Any) -> Any:
        if orders := _ORDERS.get(type(node)):
            return node._replace(
                **{field: function(getattr(node, field), orders[field]) for field in orders}
            )
        if not node.shape:
            return node
        raise UserError(
            f"the optimizer state has an array {jax.tree_util.keystr(path)} in "
            f"{_owner(opt_state, path)}, whose growth is unknown; name its moments with "
            f"stackjax.growth.moments.register_moments, or set optimizer_state to 'reset'."
        )

    return jax.tree_util.tree_map_with_path(
        apply, opt_state, is_leaf=lambda node: type(node) in _ORDERS
    )


def _owner(node: Any, path: Any) -> str:
    """Returns the type of the innermost NamedTuple on a path in a tree."""
    owner = type(node)
    for key in path:
        if isinstance(key, jax.tree_util.GetAttrKey):
            owner, node = type(node), getattr(node, key.name)
        else:
            node = node[key.key if isinstance(key, jax.tree_util.DictKey) else key.idx]
    return owner.__name__


def _widened(moment: jax.Array) -> jax.Array:
    """Returns a moment in a type to compute in."""
    return moment.astype(jnp.promote_types(moment.dtype, jnp.float32))


def _is_absent(node: Any) -> bool:
    return isinstance(node, optax.MaskedNode)
