"""Values of grown parameters: random keys, and new entries."""

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
    """Returns `grow(parameter, axes, *rest, key)` for every parameter.

    Each parameter has a different key, from `key` and the parameter's path alone.
    """

    def grow_leaf(path: Any, leaf: jax.Array, *others: Any) -> jax.Array:
        return grow(leaf, *others, key_for(jax.tree_util.keystr(path), key))

    return jax.tree_util.tree_map_with_path(grow_leaf, params, axes, *rest)


def key_for(name: str, key: jax.Array) -> jax.Array:
    """Returns a key for a name."""
    return jax.random.fold_in(key, zlib.crc32(name.encode()))


def writes_residual(names: Axes) -> bool:
    """Returns whether a parameter is a matrix whose output joins the residual stream."""
    return bool(names.reads) and names.writes == ("embed",)


def fill_new(
    grown: jax.Array,
    names: Axes,
    maps: Mapping[str, AxisMap],
    fresh: jax.Array,
    *,
    zero_writers: bool,
) -> jax.Array:
    """Returns a grown parameter with fresh values in new entries.

    Args:
      zero_writers: Whether new entries of residual writers are zero instead, so that new
        entries do not change the function.
    """
    if not any(name in maps for name in names.names):
        return grown
    values = jnp.zeros_like(grown) if zero_writers and writes_residual(names) else fresh
    return jnp.where(is_new(names, maps), values, grown)


def fill_all_new(
    grown: Any, axes: Any, maps: Mapping[str, AxisMap], fresh: Any, *, zero_writers: bool
) -> Any:
    """Returns `fill_new` of every parameter.

    Args:
      fresh: Values for new entries, in the target's tree.
    """

    def fill(leaf: jax.Array, names: Axes, values: jax.Array) -> jax.Array:
        return fill_new(leaf, names, maps, values, zero_writers=zero_writers)

    return jax.tree.map(fill, grown, axes, fresh)
