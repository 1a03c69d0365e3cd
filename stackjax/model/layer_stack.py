"""Layer parameters, stacked by name along the layers that have them."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from stackjax.model.config import ModelConfig, layers_along
from stackjax.model.module import Named
from stackjax.sharding.partition import partition, resharded

Layer = dict[str, Any]
"""A layer's parameters by name, each `Named`."""


def init_layers(
    config: ModelConfig, keys: jax.Array, init_layer: Callable[[bool], Callable[..., Layer]]
) -> Layer:
    """Returns all layers' initial parameters, stacked along the first axis.

    Parameters that all layers have are stacked along `layers`, others along `expert_layers` or
    `dense_layers`.

    Args:
      keys: A random key for each layer.
      init_layer: Returns a function from a layer's key to its parameters, given whether the
        layer has experts.
    """
    has_experts = [config.has_experts(kind) for kind in config.kinds or config.period_kinds]
    if len(set(has_experts)) == 1:
        layers = jax.vmap(init_layer(has_experts[0]))(keys)
        return {name: _along("layers", leaf) for name, leaf in layers.items()}
    stacks, order = {}, []
    for axis in ("expert_layers", "dense_layers"):
        places = np.array(layers_along(config, axis))
        stacks[axis] = jax.vmap(init_layer(axis == "expert_layers"))(keys[places])
        order += [*places]
    found: Layer = {}
    back = np.argsort(order)
    for axis, other in zip(stacks, reversed(stacks), strict=True):
        for name, leaf in stacks[axis].items():
            if name not in stacks[other]:
                found[name] = _along(axis, leaf)
            elif name not in found:
                found[name] = _merged(leaf, stacks[other][name], back)
    return found


def _along(axis: str, leaf: Named) -> Named:
    return leaf.replace(axes=leaf.axes.stack(axis))


def _merged(first: Named, second: Named, back: np.ndarray) -> Named:
    """Returns all layers' parameter, from two stacks, in the layers' order."""
    axes = first.axes.stack("layers")
    both = jnp.concatenate([first.value, second.value])
    merged = both.at[back].get(out_sharding=partition(axes))
    return Named(resharded(merged, partition(axes)), axes)
