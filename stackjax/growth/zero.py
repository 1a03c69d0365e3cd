"""Growth by what has no effect yet: zeros where something new adds to the residual stream."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import numpy as np

from stackjax.growth.axis_map import AxisMap, along, gather, new_indices, zero_new
from stackjax.growth.base import Order, Preservation
from stackjax.growth.depth import (
    Factor,
    LayerGather,
    divide_depth,
    sources_in_order,
)
from stackjax.growth.values import fill_new
from stackjax.growth.width import WidthGrowth, check_new_heads, residual_factor
from stackjax.model.config import ModelConfig
from stackjax.sharding.axes import Axes


@dataclasses.dataclass(frozen=True)
class DepthZero(LayerGather):
    """Adds layers that have no effect yet: what leaves their attention and SwiGLU is zero.

    The G_zero, depthwise, of arXiv:2405.15319. Only the matrices that add to the residual
    stream are zero, so that these learn in the first step and the rest in the second.
    """

    factor: Factor
    """How many times as deep the target is (the growth factor g)."""
    order: Literal["interleave", "stack"] = "interleave"
    """Whether new layers follow the layer that they copy, or the whole stack."""
    rest: Literal["copy", "fresh"] = "copy"
    """Whether the other parameters of a new layer are copies, or initial values."""

    @property
    def preserves_function(self) -> Preservation:
        return "always"

    def is_symmetric(self, before: bool = False) -> bool:
        return before and self.rest == "copy"

    def sources(self, depth: int) -> tuple[int, ...]:
        return sources_in_order(self.order, self.factor, depth)

    def source_depth(self, depth: int) -> int:
        return divide_depth("DepthZero", depth, self.factor)

    def grow_params(
        self,
        params: Any,
        axes: Any,
        source: ModelConfig,
        *,
        key: jax.Array,
        fresh: Callable[[ModelConfig], Any],
    ) -> Any:
        maps = self.axis_maps(source)
        copies = super().grow_params(params, axes, source, key=key, fresh=fresh)
        rest = copies if self.rest == "copy" else fresh(self.target_config(source))

        def fill_part(copy: jax.Array, names: Axes, rest: jax.Array) -> jax.Array:
            return fill_new(copy, names, maps, rest, zero_writers=True)

        return jax.tree.map(fill_part, copies, axes, rest)

    def unknown_moments(self, source: ModelConfig) -> dict[str, np.ndarray]:
        return new_indices(self.axis_maps(source))

    def grow_moment(self, moment: Any, axes: Any, source: ModelConfig, *, order: Order) -> Any:
        maps = self.axis_maps(source)
        return zero_new(super().grow_moment(moment, axes, source, order=order), axes, maps)


@dataclasses.dataclass(frozen=True)
class WidthZero(WidthGrowth):
    """Adds channels, units and heads that have no effect yet: the same function.

    The G_zero, widthwise, of arXiv:2405.15319, made exact: what adds to the residual stream
    is zero where it is new and sqrt(target / source) times as large where it is old, which
    keeps the root mean square, and gains make up for it. Everything else that is new is
    fresh, so that no unit is without a gradient.
    """

    @property
    def preserves_function(self) -> Preservation:
        return "always"

    def axis_maps(self, source: ModelConfig) -> dict[str, AxisMap]:
        check_new_heads(self, self._ratios())
        return super().axis_maps(source)

    def is_symmetric(self, before: bool = False) -> bool:
        return False

    def grow_params(
        self,
        params: Any,
        axes: Any,
        source: ModelConfig,
        *,
        key: jax.Array,
        fresh: Callable[[ModelConfig], Any],
    ) -> Any:
        maps = self.axis_maps(source)

        def grow(leaf: jax.Array, names: Axes, fresh: jax.Array) -> jax.Array:
            grown = _gather_scaled(leaf, names, source, maps, power=1)
            return fill_new(grown, names, maps, fresh, zero_writers=True)

        return jax.tree.map(grow, params, axes, fresh(self.target_config(source)))

    def unknown_moments(self, source: ModelConfig) -> dict[str, np.ndarray]:
        return new_indices(self.axis_maps(source))

    def grow_moment(self, moment: Any, axes: Any, source: ModelConfig, *, order: Order) -> Any:
        maps = self.axis_maps(source)

        def grow(leaf: jax.Array, names: Axes) -> jax.Array:
            return _gather_scaled(leaf, names, source, maps, power=-order)

        return zero_new(jax.tree.map(grow, moment, axes), axes, maps)


def _gather_scaled(
    leaf: jax.Array,
    names: Axes,
    source: ModelConfig,
    maps: Mapping[str, AxisMap],
    power: int,
) -> jax.Array:
    """Returns an array grown, times a power of its factor along the channels it writes."""
    grown = gather(leaf, names, maps)
    if "embed" in maps and "embed" in names.writes:
        axis = names.names.index("embed")
        factor = residual_factor(names, source, np.ones(grown.shape[axis])) ** power
        grown *= along(factor, axis, leaf.ndim).astype(leaf.dtype)
    return grown
