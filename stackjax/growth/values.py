"""Values of grown parameters: their keys, and what fills their new entries."""

import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from stackjax.growth.axis_map import AxisMap, is_new
from stackjax.sharding.axes import Axes


def map_params(
    grow: Callable[..., jax.Array], params: Any, axes: Any, *rest: Any, key: jax.Array
) -> Any:
    """Returns `grow(parameter, its Axes, *rest, key)` for every parameter.

    The keys differ, and depend on nothing but `key` and the parameter's name.
    """

    def grow_leaf(path: Any, leaf: jax.Array, *others: Any) -> jax.Array:
        return grow(leaf, *others, fold_name(key, jax.tree_util.keystr(path)))

    return jax.tree_util.tree_map_with_path(grow_leaf, params, axes, *rest)


def fold_name(key: jax.Array, name: str) -> jax.Array:
    """Returns a key that depends on nothing but `key` and the name."""
    return jax.random.fold_in(key, zlib.crc32(name.encode()))


def writes_residual(names: Axes) -> bool:
    """Returns whether a parameter is a matrix that adds to the residual stream."""
    return bool(names.reads) and names.writes == ("embed",)


def fill_new(
    grown: jax.Array,
    names: Axes,
    maps: Mapping[str, AxisMap],
    fresh: jax.Array,
    *,
    zero_writers: bool,
) -> jax.Array:
    """Returns what `fill` makes of a grown parameter; one that does not grow is as it was."""
    if not any(name in maps for name in names.names):
        return grown
    return fill(grown, names, is_new(names, maps), fresh, zero_writers=zero_writers)


def fill(
    grown: jax.Array, names: Axes, new: jax.Array, fresh: jax.Array, *, zero_writers: bool
) -> jax.Array:
    """Returns a grown parameter whose new entries are fresh.

    With `zero_writers`, those that add to the residual stream are zero instead, so that
    nothing that is new has an effect yet.
    """
    values = jnp.zeros_like(grown) if zero_writers and writes_residual(names) else fresh
    return jnp.where(new, values, grown)
