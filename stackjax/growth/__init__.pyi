from stackjax.growth.base import Growth, OptimizerState, Preservation
from stackjax.growth.composition import chain
from stackjax.growth.depth import (
    DepthUpscale,
    InsertBlock,
    Interleave,
    LayerGather,
    LayerMap,
    Stack,
)
from stackjax.growth.experts_copy import ExpertsCopy
from stackjax.growth.fresh import DepthFresh
from stackjax.growth.learned import Learn
from stackjax.growth.masked import DepthRandom, WidthRandom
from stackjax.growth.moments import grow_opt_state, zero_where
from stackjax.growth.noise import Noise
from stackjax.growth.shrink import Shrink
from stackjax.growth.text import parse_growth
from stackjax.growth.untie import Untie
from stackjax.growth.upcycle import Upcycle
from stackjax.growth.width import WidthSplit
from stackjax.growth.zero import DepthZero, WidthZero

__all__ = [
    "DepthFresh",
    "DepthRandom",
    "DepthUpscale",
    "DepthZero",
    "ExpertsCopy",
    "Growth",
    "InsertBlock",
    "Interleave",
    "LayerGather",
    "LayerMap",
    "Learn",
    "Noise",
    "OptimizerState",
    "Preservation",
    "Shrink",
    "Stack",
    "Untie",
    "Upcycle",
    "WidthRandom",
    "WidthSplit",
    "WidthZero",
    "chain",
    "grow_opt_state",
    "parse_growth",
    "zero_where",
]
