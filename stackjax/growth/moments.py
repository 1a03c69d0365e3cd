"""How the state of an optimizer grows with the parameters."""

from typing import Any

import jax
import optax

from stackjax.growth.base import Growth
from stackjax.model.config import ModelConfig


def grow_opt_state(growth: Growth, opt_state: Any, axes: Any, source: ModelConfig) -> Any:
    """Returns an optax state whose moments have grown; its step counts are kept.

    Args:
      axes: The `Axes` of each parameter.
      source: The config of the model that is growing.
    """

    def grow(node: Any) -> Any:
        if not _is_adam(node):
            return node
        return node._replace(
            mu=growth.grow_moment(node.mu, axes, source, order=1),
            nu=growth.grow_moment(node.nu, axes, source, order=2),
        )

    return jax.tree.map(grow, opt_state, is_leaf=_is_adam)


def _is_adam(node: Any) -> bool:
    return isinstance(node, optax.ScaleByAdamState)
