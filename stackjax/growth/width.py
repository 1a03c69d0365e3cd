"""Widthwise growth: more channels, SwiGLU units and heads.

Each growing axis has an `AxisMap`. A parameter's axis names determine the parameter's growth.
A copied unit is split: the weights that read the copies share the old weight.
"""

import dataclasses
import math
from collections.abc import Callable
from fractions import Fraction
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from stackjax.growth.axis_map import AxisMap, along, gather, is_new
from stackjax.growth.base import Growth, Order, Preservation
from stackjax.growth.depth import Factor
from stackjax.growth.values import map_params, multiplied
from stackjax.model.config import MAX_DIM, SIZES, ModelConfig, NormPlacement
from stackjax.runtime.errors import UserError
from stackjax.runtime.numbers import NonNegative
from stackjax.runtime.ranges import Rational
from stackjax.sharding.axes import Axes

Ratio = Annotated[int | Fraction, Rational(at_least=1, at_most=1000)]
"""Target size divided by source size; a fraction such as 3/2 must give a whole size."""


@dataclasses.dataclass(frozen=True)
class WidthGrowth(Growth):
    """Grows the axes in each layer by cyclic copies: 0 1 2 becomes 0 1 2 0 1 2.

    Query heads are copied within each group. The head dimension is fixed, so the attention
    scale and rotary embeddings do not change.
    """

    embed: Ratio = 1
    """Target embed_dim divided by source embed_dim; any ratio."""
    mlp: Ratio = 1
    """Target mlp_dim divided by source mlp_dim, and of expert_dim; any ratio."""
    heads: Factor = 1
    """Target num_heads divided by source num_heads."""
    kv_heads: Factor | None = None
    """Target num_kv_heads divided by source num_kv_heads; by default `heads`."""

    def _ratios(self, config: ModelConfig) -> dict[str, Ratio]:
        """Returns the ratio of each axis in a model, source or target."""
        ratios = {
            "embed": self.embed,
            "mlp": self.mlp,
            "heads": self.heads,
            "kv_heads": self.heads if self.kv_heads is None else self.kv_heads,
        }
        return ratios | {"expert_mlp": self.mlp} if config.num_experts else ratios

    def axis_maps(self, source: ModelConfig) -> dict[str, AxisMap]:
        ratios = self._ratios(source)
        for axis, ratio in ratios.items():
            _check_size(getattr(source, SIZES[axis]) * ratio, self, axis)
        maps = {
            axis: _round_map(getattr(source, SIZES[axis]), ratio, self, axis)
            for axis, ratio in ratios.items()
            if axis != "heads" and ratio != 1
        }
        if ratios["heads"] != 1 or ratios["kv_heads"] != 1:
            maps["heads"] = self._heads_map(source)
        return maps

    def _heads_map(self, source: ModelConfig) -> AxisMap:
        """Returns the query head map: a copy reads a copy of the old key and value head."""
        kv_ratio = int(self._ratios(source)["kv_heads"])
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
        for axis, ratio in self._ratios(target).items():
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
    """Copies channels, units and heads, and splits the weights that read the copies.

    Function-preserving. G_direct, widthwise, in arXiv:2405.15319, in the form of HyperCloning
    (arXiv:2409.12903). With a fractional ratio, some channels have more copies than others. A
    channel with c copies is stored sqrt(target / (source c)) times as large, to keep the
    residual stream's root mean square. Norm gains undo this scale.
    """

    split: Literal["even", "uneven"] = "even"
    """Shares of c copies: equal, or in proportion to c, c - 1, ... 1."""
    noise: NonNegative = 0.0
    """Noise on the shares, in standard deviations of the matrix (0.3 in HyperCloning). The sum
    over copies is zero. With noise, copies can diverge."""
    new_units: Literal["same_layer", "next_layer"] = "same_layer"
    """Source layer for new units. `next_layer` is AKI in bert2BERT (arXiv:2110.07143), and not
    function-preserving."""

    @property
    def preserves_function(self) -> Preservation:
        return "always" if self.new_units == "same_layer" else "never"

    def axis_maps(self, source: ModelConfig) -> dict[str, AxisMap]:
        check_mean(self, self._ratios(source), source, allows_copies=True)
        return super().axis_maps(source)

    def is_symmetric(self, before: bool = False) -> bool:
        ratios = self.embed, self.mlp, self.heads, self.kv_heads or 1
        grows = any(ratio != 1 for ratio in ratios)
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
            if self.new_units == "next_layer" and names.layer_axis and not is_gain:
                following = jnp.concatenate([leaf[1:], leaf[-1:]])
                written = {axis: maps[axis] for axis in names.writes if axis in maps}
                new = is_new(names, written)
                grown = jnp.where(new, gather(following, names, maps), grown)
            for axis, name in enumerate(names.names):
                if name in maps:
                    factor = self._factor(name, names, source, maps)
                    factor = along(factor, axis, leaf.ndim).astype(leaf.dtype)
                    grown = multiplied(grown, names, factor)
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
                    # Chain rule: the copies' gradients, times each copy's factor, add up to
                    # the source's gradient.
                    share = self._shares(name, source, maps)
                    factor = (share / self._factor(name, names, source, maps)) ** order
                    grown *= along(factor, axis, leaf.ndim).astype(leaf.dtype)
            return grown

        return jax.tree.map(grow, moment, axes)

    def _shares(self, axis: str, source: ModelConfig, maps: dict[str, AxisMap]) -> np.ndarray:
        """Returns each copy's share; shares of a source sum to 1."""
        axis_map = maps[axis]
        if axis == "kv_heads":
            # Sum over the group's query heads, divided by the source's group size.
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
        """Returns a parameter's factor for each copy along a grown axis."""
        if axis in names.reads:
            shares = self._shares(axis, source, maps)
            if axis == "embed" and reads_stream(names, source.norm_placement):
                return shares * residual_factor(names, source, maps["embed"].num_copies)
            return shares
        if axis != "embed":
            return np.ones(len(maps[axis].sources))
        return residual_factor(names, source, maps["embed"].num_copies)

    def _noise(
        self, grown: jax.Array, leaf: jax.Array, axis_map: AxisMap, axis: int, key: jax.Array
    ) -> jax.Array:
        """Returns noise for a matrix; the sum over the copies of an input is zero."""
        noise = jnp.std(leaf) * self.noise * jax.random.normal(key, grown.shape, leaf.dtype)
        front = jnp.moveaxis(noise, axis, 0)
        sources = np.array(axis_map.sources)
        sums = jax.ops.segment_sum(front, sources, num_segments=leaf.shape[axis])
        means = sums[sources] / along(axis_map.num_copies, 0, leaf.ndim).astype(leaf.dtype)
        return jnp.moveaxis(front - means, 0, axis)


def residual_factor(names: Axes, source: ModelConfig, num_copies: np.ndarray) -> np.ndarray:
    """Returns a parameter's scale along the residual stream's channels.

    Channels are sqrt(target / (source copies)) times as large, to keep the mean square. Norm
    gains undo this scale, or the matrices that read the stream without a norm. A norm's gain
    on a branch has an input with this scale already. With a tied head, the final norm
    undoes the scale twice, because the head is as large as the embedding. A bias has the scale
    of the output to which it is added. With LayerNorm, the scale is 1 (`check_mean`).
    """
    target = len(num_copies)
    scale = np.sqrt(target / (source.embed_dim * num_copies))
    wider = dataclasses.replace(source, embed_dim=target)
    if reads_stream(names, source.norm_placement):
        return 1 / scale
    if names.reads or (names.bias and names.joins is not None):
        return scale * embedding_factor(names, source, wider)
    if names.joins:
        return np.ones(target)
    is_final = not names.stacked
    if source.tie_head and is_final:
        factor = embedding_factor(names, source, wider)
        return np.full(target, source.embed_dim / target * factor)
    return np.ones(target) if names.bias else 1 / scale


def reads_stream(names: Axes, norm_placement: NormPlacement) -> bool:
    """Returns whether a matrix reads the residual stream without a norm."""
    return norm_placement == "after" and "embed" in names.reads and bool(names.stacked)


def embedding_factor(names: Axes, source: ModelConfig, target: ModelConfig) -> float:
    """Returns a parameter's factor for the same embeddings in a wider model.

    With `scale_embedding`, the model multiplies by a factor that grows with the channels. A
    tied head is smaller by the same factor, which the final gain undoes.
    """
    if not source.scale_embedding or names.stacked:
        return 1.0
    smaller = math.sqrt(source.embed_dim / target.embed_dim)
    if names.reads == ("vocab",):
        return smaller
    return 1 / smaller if source.tie_head and not names.reads else 1.0


def check_mean(
    growth: WidthGrowth, ratios: dict[str, Ratio], source: ModelConfig, *, allows_copies: bool
) -> None:
    """Raises UserError if new channels would change the mean in LayerNorm.

    The mean of the channels stays only if all have equally many copies, of the same size.

    Args:
      allows_copies: Whether new channels are copies.
    """
    ratio = Fraction(ratios["embed"])
    if source.norm == "rms" or ratio == 1 or (allows_copies and ratio.denominator == 1):
        return
    raise UserError(
        f"{growth} grows model.embed_dim {ratio} times, which changes the mean in LayerNorm "
        f"(model.norm 'layer'); grow channels with width_split at a whole ratio."
    )


def check_new_heads(growth: WidthGrowth, ratios: dict[str, Ratio], source: ModelConfig) -> None:
    """Raises UserError if old queries would read new keys, or a norm over all heads grows."""
    if source.qk_norm_over == "all_heads" and max(ratios["heads"], ratios["kv_heads"]) > 1:
        raise UserError(
            f"{growth} adds heads, which change the norm over all heads "
            f"(model.qk_norm_over); grow heads with width_split."
        )
    if ratios["kv_heads"] > ratios["heads"]:
        raise UserError(
            f"{type(growth).__name__} grows kv_heads {ratios['kv_heads']} times and heads "
            f"{ratios['heads']} times; heads must grow at least as much, or old queries would "
            f"read new keys."
        )


def _check_size(size: Ratio, growth: Growth, axis: str) -> None:
    """Raises UserError if a growth makes an axis longer than MAX_DIM."""
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
