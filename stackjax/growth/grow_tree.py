"""Growth of parameter trees in runs, checkpoints and Hugging Face folders."""

import functools
from collections.abc import Iterator
from typing import Any

import jax

from stackjax import model
from stackjax.growth.base import Growth
from stackjax.growth.values import part_of
from stackjax.model import ModelConfig, Params
from stackjax.sharding.axes import Axes
from stackjax.sharding.partition import auto_sharded, partition


def grow_tree(growth: Growth, source: ModelConfig, params: Params, key: jax.Array) -> Params:
    """Returns the grown parameters, sharded by axis names on the current mesh.

    Args:
      source: The source model's config.
      params: All parameters of the source model, or any part of the tree.
      key: Randomness of the operator and of new parameters.
    """
    axes = axes_of(source, params)

    def grow(params: Params, key: jax.Array) -> Params:
        grow_key, fresh_key = jax.random.split(key)
        fresh = functools.partial(model.init, key=fresh_key)
        return growth.target_params(params, axes, source, key=grow_key, fresh=fresh)

    target = growth.target_axes(axes, source)
    layout = jax.tree.map(partition, target, is_leaf=lambda node: isinstance(node, Axes))
    # Operators do not choose layouts: the compiler does.
    return auto_sharded(grow, layout)(params, key)


def axes_of(config: ModelConfig, params: Params) -> Any:
    """Returns the `Axes` of each parameter in a part of a model's tree."""
    return part_of(model.logical_axes(config), params)


def split_tree(tree: Any) -> Iterator[Any]:
    """Returns a tree of nested dicts in parts, one for each leaf."""
    for name, branch in tree.items():
        parts = split_tree(branch) if isinstance(branch, dict) else (branch,)
        yield from ({name: part} for part in parts)
