"""Random growth behind masks: new entries join the model gradually.

The masks in MSG (arXiv:2305.02869) multiply activations. Here, masks multiply parameters, and
the model has no code for masks. Closed and open masks compute the same function as MSG.
Half-open channels have other weights in RMSNorm than in MSG and prts; see `Mask`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from stackjax.growth.axis_map import AxisMap, along, gather, new_indices, zero_new
from stackjax.growth.base import (
    Growth,
    Order,
    Preservation,
    Reparameterization,
)
from stackjax.growth.depth import (
    Factor,
    NewLayers,
    check_alike,
    divide_depth,
    sources_in_order,
)
from stackjax.growth.values import fill_all_new, multiplied
from stackjax.growth.width import (
    WidthGrowth,
    check_mean,
    check_new_heads,
    embedding_factor,
    reads_stream,
)
from stackjax.model.config import ModelConfig, NormPlacement
from stackjax.runtime.numbers import Tokens
from stackjax.sharding.axes import Axes


@dataclasses.dataclass(frozen=True)
class Mask(Reparameterization):
    """Adds new entries along an axis to the residual stream, linearly over tokens.

    The mask m is 1 for old entries and v, from 0 to 1, for new entries. For D channels, with
    r = sqrt(D / sum(m)), residual writers are multiplied by r m, and norm gains by m / r. With
    x, the sum of all writes times m, and a gain g, RMSNorm is exactly

        g m x / sqrt(sum(x^2) / sum(m) + epsilon)

    MSG weights the squares by another m: sum(m x^2) / sum(m). prts normalizes m x: the squares
    have the factor m^2, epsilon has the factor D / sum(m), and the result another factor m.
    Here, a head mask multiplies each head's output; in MSG and prts, queries, keys and values.
    """

    axis: str
    shares: tuple[float, ...]
    """For each entry along the axis, the share of `tokens` from closed to open; 0 for old
    entries."""
    tie_head: bool
    first_tokens: int
    """Tokens since growth at which the mask starts to open."""
    tokens: int
    """Tokens from closed to open."""
    norm_placement: NormPlacement = "before"
    """As in the model."""

    @property
    def end_tokens(self) -> float:
        """Tokens since growth until the whole mask is open."""
        return self.first_tokens + self.tokens

    def model_params(self, params: Any, axes: Any, tokens: jax.Array) -> Any:
        # Floats, because token counts overflow int32.
        since = tokens - float(self.first_tokens)
        shares = jnp.array(self.shares)
        opening = since / (float(self.tokens) * jnp.where(shares > 0, shares, 1.0))
        mask = jnp.where(shares > 0, jnp.clip(opening, 0.0, 1.0), 1.0)

        def apply(leaf: jax.Array, names: Axes) -> jax.Array:
            factor = self._factor(names, mask)
            if factor is None:
                return leaf
            return multiplied(
                leaf, names, along(factor, names.names.index(self.axis), leaf.ndim)
            )

        return jax.tree.map(apply, params, axes)

    def _factor(self, names: Axes, mask: jax.Array) -> jax.Array | None:
        if self.axis == "layers":
            return mask if "layers" in names.stacked and names.joins_stream else None
        if self.axis != "embed":
            return mask if self.axis in names.reads else None
        scale = jnp.sqrt(mask.size / jnp.sum(mask))
        if reads_stream(names, self.norm_placement):
            # No norm undoes the residual stream's scale.
            return jnp.full_like(mask, 1 / scale)
        if "embed" not in names.writes:
            return None
        if names.reads or names.bias:
            return scale * mask
        if names.joins:
            return None  # its input has the mask and the scale already
        is_final = not names.stacked
        # A tied head has the embedding's scale; the final gain compensates.
        return mask / (scale * scale if self.tie_head and is_final else scale)


@dataclasses.dataclass(frozen=True)
class DepthRandom(NewLayers):
    """Adds initialized layers behind a mask that opens: X + layer(X) m.

    G_random, depthwise, with the formula in arXiv:2405.15319. The released code instead mixes
    the layer's output with the layer's input.
    """

    factor: Factor
    """Target num_layers divided by source num_layers (the growth factor g)."""
    mask_tokens: Tokens
    """Tokens from a closed to an open mask."""
    order: Literal["interleave", "stack"] = "interleave"
    """Place of new layers: `interleave` after each old layer (or period of
    `model.pattern`), `stack` after all old layers."""
    init: Literal["fresh", "copy"] = "fresh"
    """Values of new layers: `fresh` initial values, or a `copy` of old layers."""
    phases: Literal["together", "bottom_up"] = "together"
    """`together` opens all masks at once. `bottom_up` opens new layer j of n, counted from 1,
    over j / n of `mask_tokens`: the linear schedule of ProRes (arXiv:2603.05369), which has
    one mask for each layer of a model from scratch."""

    @property
    def preserves_function(self) -> Preservation:
        return "at_start"

    def is_symmetric(self, before: bool = False) -> bool:
        return before and self.init == "copy"

    @property
    def copies_periods(self) -> bool:
        return self.order == "interleave"

    def sources(self, depth: int) -> tuple[int, ...]:
        return sources_in_order(self.order, self.factor, depth)

    def source_depth(self, depth: int) -> int:
        return divide_depth("DepthRandom", depth, self.factor)

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
        return copies if self.init == "copy" else _freshen(self, copies, axes, source, fresh)

    def reparameterizations(self, source: ModelConfig) -> tuple[Reparameterization, ...]:
        check_alike(self, source)
        shares = _shares(self.axis_maps(source)["layers"])
        if self.phases == "bottom_up":
            order = np.cumsum(shares)
            shares = shares * order / max(order[-1], 1)
        return (Mask("layers", _floats(shares), source.tie_head, 0, self.mask_tokens),)


@dataclasses.dataclass(frozen=True)
class WidthRandom(WidthGrowth):
    """Adds initialized channels, units and heads behind masks that open.

    G_random, widthwise, in arXiv:2405.15319.
    """

    mask_tokens: Tokens = dataclasses.field(kw_only=True)
    """Tokens from closed to open, for each mask."""
    phases: Literal["in_turn", "together"] = "in_turn"
    """`in_turn` opens SwiGLU units, then channels, then heads, like the released code;
    `together` opens all masks at once."""
    init: Literal["fresh", "copy"] = "fresh"
    """Values of new entries: `fresh` initial values, or a `copy` of old entries."""

    @property
    def preserves_function(self) -> Preservation:
        return "at_start"

    def is_symmetric(self, before: bool = False) -> bool:
        return before and self.init == "copy"

    def axis_maps(self, source: ModelConfig) -> dict[str, AxisMap]:
        check_new_heads(self, self._ratios(source), source)
        check_mean(self, self._ratios(source), source, allows_copies=False)
        return super().axis_maps(source)

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
        target = self.target_config(source)

        def copy(leaf: jax.Array, names: Axes) -> jax.Array:
            return multiplied(
                gather(leaf, names, maps), names, embedding_factor(names, source, target)
            )

        copies = jax.tree.map(copy, params, axes)
        return copies if self.init == "copy" else _freshen(self, copies, axes, source, fresh)

    def unknown_moments(self, source: ModelConfig) -> dict[str, np.ndarray]:
        return new_indices(self.axis_maps(source))

    def grow_moment(self, moment: Any, axes: Any, source: ModelConfig, *, order: Order) -> Any:
        maps, target = self.axis_maps(source), self.target_config(source)

        def grow(leaf: jax.Array, names: Axes) -> jax.Array:
            # A mask's factors cancel those of the wider stream.
            return gather(leaf, names, maps) * embedding_factor(names, source, target) ** -order

        return zero_new(jax.tree.map(grow, moment, axes), axes, maps)

    def reparameterizations(self, source: ModelConfig) -> tuple[Reparameterization, ...]:
        maps = self.axis_maps(source)
        units = ("mlp", "expert_mlp") if source.num_experts else ("mlp",)
        turns = [axes for axes in (units, ("embed",), ("heads",)) if axes[0] in maps]
        return tuple(
            Mask(
                axis,
                _floats(_shares(maps[axis])),
                source.tie_head,
                i * self.mask_tokens if self.phases == "in_turn" else 0,
                self.mask_tokens,
                source.norm_placement,
            )
            for i, axes in enumerate(turns)
            for axis in axes
        )


def _freshen(
    growth: Growth,
    copies: Any,
    axes: Any,
    source: ModelConfig,
    fresh: Callable[[ModelConfig], Any],
) -> Any:
    maps, values = growth.axis_maps(source), fresh(growth.target_config(source))
    return fill_all_new(copies, axes, maps, values, zero_writers=False)


def _shares(axis_map: AxisMap) -> np.ndarray:
    return axis_map.is_new.astype(float)


def _floats(shares: np.ndarray) -> tuple[float, ...]:
    return tuple(shares.tolist())
