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


def part_of(tree: Any, like: Any) -> Any:
    """Returns the entries of nested dicts with a counterpart in another tree."""
    return {
        name: part_of(tree[name], part) if isinstance(part, dict) else tree[name]
        for name, part in like.items()
    }


def key_for(name: str, key: jax.Array) -> jax.Array:
    """Returns a key for a name."""
    return jax.random.fold_in(key, zlib.crc32(name.encode()))


def writes_channels(names: Axes) -> bool:
    """Returns whether a parameter is a matrix, or its bias, with the stream's output channels.

    Its output joins the residual stream, or is normalized before.
    """
    return (bool(names.reads) or names.bias) and names.writes == ("embed",)


def multiplied(leaf: jax.Array, names: Axes, factor: Any) -> jax.Array:
    """Returns a parameter with all values in use multiplied by a broadcastable factor."""
    return leaf * factor + (factor - 1) if names.unit_offset else leaf * factor


def fill_new(
    grown: jax.Array,
    names: Axes,
    maps: Mapping[str, AxisMap],
    fresh: jax.Array,
    *,
    is_zero: bool = False,
) -> jax.Array:
    """Returns a grown parameter with fresh values in new entries.

    Args:
      is_zero: Whether new entries are zero instead, so that they do not change the function.
    """
    if not any(name in maps for name in names.names):
        return grown
    values = fresh
    if is_zero:
        values = jnp.full_like(grown, -1 if names.unit_offset else 0)
    return jnp.where(is_new(names, maps), values, grown)


def fill_all_new(
    grown: Any, axes: Any, maps: Mapping[str, AxisMap], fresh: Any, *, zero_writers: bool
) -> Any:
    """Returns `fill_new` of every parameter.

    Args:
      fresh: Values for new entries, in the target's tree.
      zero_writers: Whether new entries that write to the residual stream are zero instead.
    """

    def fill(leaf: jax.Array, names: Axes, values: jax.Array) -> jax.Array:
        is_zero = zero_writers and names.joins_stream
        return fill_new(leaf, names, maps, values, is_zero=is_zero)

    return jax.tree.map(fill, grown, axes, fresh)
