"""Depthwise growth: each target layer is made from a source layer."""

import abc
import dataclasses
import re
from collections.abc import Callable
from typing import Annotated, Any, Literal

import jax
import numpy as np

from stackjax.growth.axis_map import NEW, AxisMap, gather_tree, new_indices, zero_new
from stackjax.growth.base import Growth, Order, check_kinds
from stackjax.growth.pattern import parse_pattern
from stackjax.model.config import MAX_LAYERS, ModelConfig, layers_along
from stackjax.runtime.errors import UserError
from stackjax.runtime.numbers import Size
from stackjax.runtime.ranges import Length, Whole
from stackjax.sharding.axes import LAYER_AXES

Factor = Annotated[int, Whole(at_least=1, at_most=1000)]
"""Target size divided by source size, for depth or width."""


@dataclasses.dataclass(frozen=True)
class LayerGather(Growth):
    """Gathers target layers from source layers."""

    @abc.abstractmethod
    def sources(self, depth: int) -> tuple[int, ...]:
        """Returns the source layer, counted from 0, for each target layer."""

    @abc.abstractmethod
    def source_depth(self, depth: int) -> int:
        """Returns the source depth for a target with `depth` layers."""

    @property
    def grows_folded(self) -> bool:
        return self.preserves_function != "never"

    @property
    def copies_periods(self) -> bool:
        """Does `sources` count the periods in `model.pattern`, not the layers?

        Copies in place move later layers, so whole periods are copied.
        """
        return False

    def axis_maps(self, source: ModelConfig) -> dict[str, AxisMap]:
        size = len(source.period_kinds) if self.copies_periods else 1
        if source.num_layers % size:
            raise UserError(
                f"{self} copies whole periods of model.pattern, and model.num_layers "
                f"{source.num_layers} is no multiple of its {size} layers."
            )
        units = self.sources(source.num_layers // size)
        if not units:
            raise UserError(
                f"{self} grows layers, and model.num_layers is 0; begin with "
                f"depth_fresh(LAYERS)."
            )
        sources = tuple(size * unit + i for unit in units for i in range(size))
        return {"layers": AxisMap(sources)} | self._maps_by_kind(sources, source)

    def _maps_by_kind(
        self, sources: tuple[int, ...], source: ModelConfig
    ) -> dict[str, AxisMap]:
        """Returns the maps of `expert_layers` and `dense_layers` in a mixed model."""
        if not source.num_experts:
            return {}
        target = dataclasses.replace(source, num_layers=len(sources))
        if source.is_mixed != target.is_mixed:
            raise UserError(
                f"{self} makes {len(sources)} layers from {source.num_layers}, and only one of "
                f"both models has dense layers among layers with experts; begin with a whole "
                f"period of model.pattern."
            )
        if not source.is_mixed:
            return {}
        check_kinds(self, sources, source, target)
        maps = {}
        for axis in LAYER_AXES[1:]:
            place = {layer: i for i, layer in enumerate(layers_along(source, axis))}
            place[NEW] = NEW
            along = layers_along(target, axis)
            maps[axis] = AxisMap(tuple(place[sources[layer]] for layer in along))
        return maps

    def source_config(self, target: ModelConfig) -> ModelConfig:
        return dataclasses.replace(target, num_layers=self.source_depth(target.num_layers))

    def grow_params(
        self,
        params: Any,
        axes: Any,
        source: ModelConfig,
        *,
        key: jax.Array,
        fresh: Callable[[ModelConfig], Any],
    ) -> Any:
        return gather_tree(params, axes, self.axis_maps(source))


@dataclasses.dataclass(frozen=True)
class NewLayers(LayerGather, is_operator=False):
    """Adds layers whose moments are unknown: zero, until these layers learn."""

    def unknown_moments(self, source: ModelConfig) -> dict[str, np.ndarray]:
        return new_indices(self.axis_maps(source))

    def grow_moment(self, moment: Any, axes: Any, source: ModelConfig, *, order: Order) -> Any:
        grown = super().grow_moment(moment, axes, source, order=order)
        return zero_new(grown, axes, self.axis_maps(source))


@dataclasses.dataclass(frozen=True)
class Stack(LayerGather):
    """Repeats the whole layer stack: 0 1 2 becomes 0 1 2 0 1 2.

    G_stack in arXiv:2405.15319 (also called G_direct, depthwise).
    """

    factor: Factor = 4
    """Target num_layers divided by source num_layers (the growth factor g)."""

    def sources(self, depth: int) -> tuple[int, ...]:
        check_depth(self, depth * self.factor)
        return tuple(range(depth)) * self.factor

    def source_depth(self, depth: int) -> int:
        return divide_depth("Stack", depth, self.factor)


@dataclasses.dataclass(frozen=True)
class Interleave(LayerGather):
    """Repeats every layer in place: 0 1 2 becomes 0 0 1 1 2 2.

    With `model.pattern`, every period. Interpolation in arXiv:2405.15319.
    """

    factor: Factor = 2
    """Target num_layers divided by source num_layers (the growth factor g)."""

    @property
    def copies_periods(self) -> bool:
        return True

    def sources(self, depth: int) -> tuple[int, ...]:
        check_depth(self, depth * self.factor)
        return tuple(layer for layer in range(depth) for _ in range(self.factor))

    def source_depth(self, depth: int) -> int:
        return divide_depth("Interleave", depth, self.factor)


@dataclasses.dataclass(frozen=True)
class LayerMap(LayerGather):
    """Gathers target layers from an explicit list of source layers.

    `LayerMap("12-3456*5-56")` is a pattern in the notation of arXiv:2405.15319 and counts
    layers from 1. `LayerMap((0, 1, 1, 2))` counts layers from 0. For a given target, the
    highest layer in the list is the last source layer.
    """

    layers: Annotated[
        tuple[Annotated[int, Whole(at_least=0, at_most=MAX_LAYERS)], ...] | str,
        Length(at_most=MAX_LAYERS),
    ]
    """A source layer for each target layer: a tuple from 0, or a pattern from 1."""

    def __post_init__(self):
        super().__post_init__()
        if isinstance(self.layers, str):
            # Spaces between digits stay, so that `parse_pattern` rejects the pattern.
            pattern = re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", self.layers)
            object.__setattr__(self, "layers", pattern)
        self._indices()

    def _indices(self) -> tuple[int, ...]:
        if isinstance(self.layers, str):
            return parse_pattern(self.layers)
        return self.layers

    def sources(self, depth: int) -> tuple[int, ...]:
        indices = self._indices()
        if max(indices) >= depth:
            base = 1 if isinstance(self.layers, str) else 0
            raise UserError(
                f"LayerMap {self.layers!r} names layer {max(indices) + base} (counted from "
                f"{base}) of a model with {depth} layers."
            )
        return indices

    def source_depth(self, depth: int) -> int:
        indices = self._indices()
        if len(indices) != depth:
            raise UserError(
                f"LayerMap {self.layers!r} makes {len(indices)} layers, but the target has "
                f"model.num_layers {depth}; let both agree."
            )
        return max(indices) + 1


@dataclasses.dataclass(frozen=True)
class DepthUpscale(LayerGather):
    """Stacks two copies: 0 1 2 3 becomes 0 1 2 1 2 3.

    The lower copy loses the last layers, the upper copy loses the first layers. Depth
    up-scaling in SOLAR (arXiv:2312.15166); `drop` is m in the paper.
    """

    drop: Size
    """Layers lost by each copy."""

    def sources(self, depth: int) -> tuple[int, ...]:
        if 2 * self.drop > depth:
            raise UserError(
                f"DepthUpscale(drop={self.drop}) would lose layers of a model with {depth}: "
                f"drop at most half of them."
            )
        return (*range(depth - self.drop), *range(self.drop, depth))

    def source_depth(self, depth: int) -> int:
        return divide_depth("DepthUpscale", depth, 2) + self.drop


@dataclasses.dataclass(frozen=True)
class InsertBlock(LayerGather):
    """Inserts a copy of a block of layers: 0 1 2 3 becomes 0 1 0 1 2 3.

    `middle` is MIDAS (arXiv:2409.19044): among n blocks, counted from 1, block ceil(n / 2) is
    repeated right above itself. `last` is gradual stacking. `center` is LIDAS
    (arXiv:2512.08819): between the two middle blocks, it inserts the upper half of the lower
    block and the lower half of the upper block, so 0 1 2 3 becomes 0 1 1 2 2 3. With an odd
    number of blocks, `center` is `middle`. As everywhere, the first copy of a layer is old.
    """

    size: Size
    """Layers in a block; must divide num_layers."""
    at: Literal["middle", "last", "center"] = "middle"
    """The copied block."""

    def sources(self, depth: int) -> tuple[int, ...]:
        blocks = divide_depth("InsertBlock", depth, self.size, field="size")
        if not blocks:
            return ()
        index = blocks if self.at == "last" else -(-blocks // 2)
        end = index * self.size
        stop = end
        if self.at == "center" and blocks % 2 == 0:
            stop = end + self.size // 2
            if self.size % 2:
                raise UserError(
                    f"{self} copies half of each of two blocks, and size is {self.size}; "
                    f"choose an even size."
                )
        return (*range(end), *range(stop - self.size, stop), *range(end, depth))

    def source_depth(self, depth: int) -> int:
        if depth <= self.size:
            raise UserError(
                f"InsertBlock(size={self.size}) cannot make model.num_layers {depth}: "
                f"nothing would be left to grow from."
            )
        return depth - self.size


def sources_in_order(
    order: Literal["interleave", "stack"], factor: int, depth: int
) -> tuple[int, ...]:
    """Returns each target layer's source layer under `Interleave` or `Stack`."""
    growth = Interleave(factor) if order == "interleave" else Stack(factor)
    return growth.sources(depth)


def check_alike(growth: Growth, source: ModelConfig) -> None:
    """Raises UserError for a model with dense layers among layers with experts."""
    if source.is_mixed:
        raise UserError(
            f"{growth} grows layers with the same parameters, and model.pattern has dense "
            f"layers among layers with experts; take stack, interleave, layer_map, "
            f"insert_block or depth_zero."
        )


def check_depth(growth: Growth, depth: int) -> None:
    """Raises UserError if a growth makes more than MAX_LAYERS layers."""
    if depth > MAX_LAYERS:
        raise UserError(
            f"{growth} makes {depth} layers, and a model may have {MAX_LAYERS}; take a "
            f"smaller factor."
        )


def divide_depth(name: str, depth: int, factor: int, field: str = "factor") -> int:
    """Returns `depth / factor`; UserError, with the operator's name, if not an integer."""
    if depth % factor:
        raise UserError(
            f"{name}({field}={factor}) does not fit model.num_layers {depth}: {factor} does "
            f"not divide {depth}."
        )
    return depth // factor
