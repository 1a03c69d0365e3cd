"""Widthwise growth: more channels, SwiGLU units and heads.

Every axis is described by an `AxisMap`, and every parameter follows from the names of its
axes. A copied unit is split: those who read its copies share its weight between them.
"""

import dataclasses
from collections.abc import Callable
from fractions import Fraction
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from stackjax.growth.axis_map import AxisMap, along, gather, is_new
from stackjax.growth.base import Growth, Order, Preservation
from stackjax.growth.depth import Factor
from stackjax.growth.values import map_params
from stackjax.model.config import MAX_DIM, SIZES, ModelConfig
from stackjax.runtime.errors import UserError
from stackjax.runtime.numbers import NonNegative
from stackjax.runtime.ranges import Rational
from stackjax.sharding.axes import Axes

Ratio = Annotated[int | Fraction, Rational(at_least=1, at_most=1000)]
"""How many times as wide an axis becomes; 3/2 where that makes a whole number."""


@dataclasses.dataclass(frozen=True)
class WidthGrowth(Growth):
    """Grows the axes of a layer; what was there comes first, and copies go round it.

    Head dimensions stay, so that neither the scale of attention nor the rotation changes.
    """

    embed: Ratio = 1
    """How many times as many channels the residual stream has; any ratio."""
    mlp: Ratio = 1
    """How many times as many hidden units each SwiGLU has; any ratio."""
    heads: Factor = 1
    """How many times as many query heads there are."""
    kv_heads: Factor | None = None
    """How many times as many key and value heads there are; by default as `heads`."""

    def _ratios(self) -> dict[str, Ratio]:
        kv_heads = self.heads if self.kv_heads is None else self.kv_heads
        return {
            "embed": self.embed,
            "mlp": self.mlp,
            "heads": self.heads,
            "kv_heads": kv_heads,
        }

    def axis_maps(self, source: ModelConfig) -> dict[str, AxisMap]:
        ratios = self._ratios()
        for axis, ratio in ratios.items():
            _check_size(getattr(source, SIZES[axis]) * ratio, self, axis)
        maps = {
            axis: _round_map(getattr(source, SIZES[axis]), ratios[axis], self, axis)
            for axis in ("embed", "mlp", "kv_heads")
            if ratios[axis] != 1
        }
        if ratios["heads"] != 1 or ratios["kv_heads"] != 1:
            maps["heads"] = self._heads_map(source)
        return maps

    def _heads_map(self, source: ModelConfig) -> AxisMap:
        """Returns the map of the query heads: every copy reads a copy of what it read."""
        kv_ratio = int(self._ratios()["kv_heads"])
        group = source.num_heads // source.num_kv_heads
        if group * self.heads % kv_ratio:
            raise UserError(
                f"{type(self).__name__} cannot grow {source.num_kv_heads} key/value heads "
                f"{kv_ratio} times: {group} query heads each, {self.heads} times as many, do "
                f"not divide among the copies."
            )
        per_copy = group * self.heads // kv_ratio
        return AxisMap(
            tuple(
                kv_head * group + (copy * per_copy + slot) % group
                for copy in range(kv_ratio)
                for kv_head in range(source.num_kv_heads)
                for slot in range(per_copy)
            )
        )

    def source_config(self, target: ModelConfig) -> ModelConfig:
        sizes = {}
        for axis, ratio in self._ratios().items():
            size = getattr(target, SIZES[axis]) / Fraction(ratio)
            if size.denominator != 1:
                raise UserError(
                    f"{type(self).__name__} cannot make model.{SIZES[axis]} "
                    f"{getattr(target, SIZES[axis])}, {ratio} times as many as {size}; "
                    f"choose a ratio that leaves a whole number."
                )
            sizes[SIZES[axis]] = int(size)
        return dataclasses.replace(target, **sizes)


@dataclasses.dataclass(frozen=True)
class WidthSplit(WidthGrowth):
    """Copies channels, units and heads, and splits what reads them: the same function.

    The G_direct, widthwise, of arXiv:2405.15319, in the form of HyperCloning
    (arXiv:2409.12903). Where a ratio is not whole, channels have unequally many copies:
    copy j of channel i, one of c, is stored sqrt(target / (source c)) times as large, which
    keeps the root mean square of the residual stream, and gains make up for it.
    """

    split: Literal["even", "uneven"] = "even"
    """How copies share what reads them: alike, or in proportion to c, c - 1, ... 1."""
    noise: NonNegative = 0.0
    """Noise on the shares that cancels over the copies, in standard deviations of the
    matrix; 0.3 is that of HyperCloning. It lets copies become different."""
    new_units: Literal["same_layer", "next_layer"] = "same_layer"
    """Where new units of a layer come from; `next_layer` is AKI of bert2BERT
    (arXiv:2110.07143), which does not keep the function."""

    @property
    def preserves_function(self) -> Preservation:
        return "always" if self.new_units == "same_layer" else "never"

    def is_symmetric(self, before: bool = False) -> bool:
        grows = any(ratio != 1 for ratio in self._ratios().values())
        even = self.split == "even" and not self.noise and self.new_units == "same_layer"
        return before or (grows and even)

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

        def grow(leaf: jax.Array, names: Axes, key: jax.Array) -> jax.Array:
            grown = gather(leaf, names, maps)
            is_gain = not names.reads and "embed" in names.writes
            if self.new_units == "next_layer" and "layers" in names.stacked and not is_gain:
                following = jnp.concatenate([leaf[1:], leaf[-1:]])
                written = {axis: maps[axis] for axis in names.writes if axis in maps}
                new = is_new(names, written)
                grown = jnp.where(new, gather(following, names, maps), grown)
            for axis, name in enumerate(names.names):
                if name in maps:
                    factor = self._factor(name, names, source, maps)
                    grown *= along(factor, axis, leaf.ndim).astype(leaf.dtype)
                    if self.noise and name in names.reads:
                        grown += self._noise(grown, leaf, maps[name], axis, key)
            return grown

        return map_params(grow, params, axes, key=key)

    def grow_moment(self, moment: Any, axes: Any, source: ModelConfig, *, order: Order) -> Any:
        maps = self.axis_maps(source)

        def grow(leaf: jax.Array, names: Axes) -> jax.Array:
            grown = gather(leaf, names, maps)
            for axis, name in enumerate(names.names):
                if name in maps:
                    # The copies' gradients, times how each depends on the source, add up
                    # to the source's.
                    share = self._shares(name, source, maps)
                    factor = (share / self._factor(name, names, source, maps)) ** order
                    grown *= along(factor, axis, leaf.ndim).astype(leaf.dtype)
            return grown

        return jax.tree.map(grow, moment, axes)

    def _shares(self, axis: str, source: ModelConfig, maps: dict[str, AxisMap]) -> np.ndarray:
        """Returns the part of its source that every copy carries; they add up to 1."""
        axis_map = maps[axis]
        if axis == "kv_heads":
            # What the query heads that read it carry, over as many heads of the source.
            of_heads = self._shares("heads", source, maps)
            group = source.num_heads // source.num_kv_heads
            return of_heads.reshape(len(axis_map.sources), -1).sum(axis=1) / group
        copies = axis_map.num_copies
        if self.split == "even":
            return 1 / copies
        return 2 * (copies - axis_map.copy) / (copies * (copies + 1))

    def _factor(
        self, axis: str, names: Axes, source: ModelConfig, maps: dict[str, AxisMap]
    ) -> np.ndarray:
        """Returns what each copy of a parameter is multiplied by along a grown axis."""
        if axis in names.reads:
            return self._shares(axis, source, maps)
        if axis != "embed":
            return np.ones(len(maps[axis].sources))
        return residual_factor(names, source, maps["embed"].num_copies)

    def _noise(
        self, grown: jax.Array, leaf: jax.Array, axis_map: AxisMap, axis: int, key: jax.Array
    ) -> jax.Array:
        """Returns noise for a matrix that adds up to zero over the copies it reads."""
        noise = jnp.std(leaf) * self.noise * jax.random.normal(key, grown.shape, leaf.dtype)
        front = jnp.moveaxis(noise, axis, 0)
        sources = np.array(axis_map.sources)
        sums = jax.ops.segment_sum(front, sources, num_segments=leaf.shape[axis])
        means = sums[sources] / along(axis_map.num_copies, 0, leaf.ndim).astype(leaf.dtype)
        return jnp.moveaxis(front - means, 0, axis)


def residual_factor(names: Axes, source: ModelConfig, num_copies: np.ndarray) -> np.ndarray:
    """Returns the scale of a parameter along the channels of the residual stream it writes.

    Channels are sqrt(target / (source copies)) times as large, which keeps the mean of
    their squares. The gain of a norm undoes it, and the final gain of a model with a tied
    head once more, because the head then is as large as the embedding.
    """
    target = len(num_copies)
    scale = np.sqrt(target / (source.embed_dim * num_copies))
    if names.reads:
        return scale
    is_final = not names.stacked
    if source.tie_head and is_final:
        return np.full(target, source.embed_dim / target)
    return 1 / scale


def check_new_heads(growth: WidthGrowth, ratios: dict[str, Ratio]) -> None:
    """Raises UserError where a query head that is there would read a head that is new."""
    if ratios["kv_heads"] > ratios["heads"]:
        raise UserError(
            f"{type(growth).__name__} grows kv_heads {ratios['kv_heads']} times and heads "
            f"{ratios['heads']} times; heads must grow at least as much, or old queries would "
            f"read new keys."
        )


def _check_size(size: Ratio, growth: Growth, axis: str) -> None:
    """Raises UserError where a growth makes an axis longer than a model may have."""
    if size > MAX_DIM:
        raise UserError(
            f"{growth} makes model.{SIZES[axis]} {size}, which may be {MAX_DIM}; take a "
            f"smaller ratio."
        )


def _round_map(size: int, ratio: Ratio, growth: Growth, axis: str) -> AxisMap:
    target = size * Fraction(ratio)
    if target.denominator != 1:
        raise UserError(
            f"{type(growth).__name__} grows model.{SIZES[axis]} {size} {ratio} times, which "
            f"is {float(target):g}; choose a ratio that makes a whole number."
        )
    return AxisMap(tuple(i % size for i in range(int(target))))
