"""Growth operators: pure functions from a small model to a large one."""

from stackjax.growth.base import Growth, Promise, chain
from stackjax.growth.depth import Interleave, LayerMap, Stack
from stackjax.growth.moments import grow_opt_state

__all__ = [
    "Growth",
    "Interleave",
    "LayerMap",
    "Promise",
    "Stack",
    "chain",
    "grow_opt_state",
]
