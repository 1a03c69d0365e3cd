"""Zero growth: new residual writers are zero, so new entries have no effect at first."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import numpy as np

from stackjax.growth.axis_map import AxisMap, along, gather, new_indices, zero_new
from stackjax.growth.base import Order, Preservation
from stackjax.growth.depth import (
    Factor,
    NewLayers,
    divide_depth,
    sources_in_order,
)
from stackjax.growth.values import fill_all_new, fill_new, multiplied, writes_channels
from stackjax.growth.width import (
    WidthGrowth,
    check_mean,
    check_new_heads,
    reads_stream,
    residual_factor,
)
from stackjax.model.config import ModelConfig
from stackjax.sharding.axes import Axes


@dataclasses.dataclass(frozen=True)
class DepthZero(NewLayers):
    """Adds layers without effect: the outputs of attention and SwiGLU are zero.

    G_zero, depthwise, in arXiv:2405.15319. Only residual writers are zero. Residual writers
    learn in the first step, other parameters from the second step on.
    """

    factor: Factor
    """Target num_layers divided by source num_layers (the growth factor g)."""
    order: Literal["interleave", "stack"] = "interleave"
    """Place of new layers: `interleave` after each old layer (or period of
    `model.pattern`), `stack` after all old layers."""
    rest: Literal["copy", "fresh"] = "copy"
    """Other parameters in new layers: a `copy` of old layers, or `fresh` initial values."""

    @property
    def preserves_function(self) -> Preservation:
        return "always"

    def is_symmetric(self, before: bool = False) -> bool:
        return before and self.rest == "copy"

    @property
    def copies_periods(self) -> bool:
        return self.order == "interleave"

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
        copies = super().grow_params(params, axes, source, key=key, fresh=fresh)
        rest = copies if self.rest == "copy" else fresh(self.target_config(source))
        return fill_all_new(copies, axes, self.axis_maps(source), rest, zero_writers=True)


@dataclasses.dataclass(frozen=True)
class WidthZero(WidthGrowth):
    """Adds channels, units and heads without effect. Function-preserving.

    G_zero, widthwise, in arXiv:2405.15319, made exact. In residual writers, new entries are
    zero, and old entries are sqrt(target / source) times as large. This keeps the residual
    stream's root mean square; norm gains undo the scale. All other new entries have initial
    values, so every unit has a gradient.
    """

    @property
    def preserves_function(self) -> Preservation:
        return "always"

    def axis_maps(self, source: ModelConfig) -> dict[str, AxisMap]:
        check_new_heads(self, self._ratios(source), source)
        check_mean(self, self._ratios(source), source, allows_copies=False)
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
            return fill_new(grown, names, maps, fresh, is_zero=writes_channels(names))

        return jax.tree.map(grow, params, axes, fresh(self.target_config(source)))

    def unknown_moments(self, source: ModelConfig) -> dict[str, np.ndarray]:
        return new_indices(self.axis_maps(source))

    def grow_moment(self, moment: Any, axes: Any, source: ModelConfig, *, order: Order) -> Any:
        maps = self.axis_maps(source)

        def grow(leaf: jax.Array, names: Axes) -> jax.Array:
            # The moment for a gain stored minus 1 has the same factor, and no offset.
            plain = dataclasses.replace(names, unit_offset=False)
            return _gather_scaled(leaf, plain, source, maps, power=-order)

        return zero_new(jax.tree.map(grow, moment, axes), axes, maps)


def _gather_scaled(
    leaf: jax.Array,
    names: Axes,
    source: ModelConfig,
    maps: Mapping[str, AxisMap],
    power: int,
) -> jax.Array:
    """Returns a grown array, times a `residual_factor` power along channels."""
    grown = gather(leaf, names, maps)
    if "embed" not in maps:
        return grown
    if "embed" in names.writes or reads_stream(names, source.norm_placement):
        axis = names.names.index("embed")
        factor = residual_factor(names, source, np.ones(grown.shape[axis])) ** power
        return multiplied(grown, names, along(factor, axis, leaf.ndim).astype(leaf.dtype))
    return grown
