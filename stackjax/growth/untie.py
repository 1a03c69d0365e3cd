"""Growth of a looped model into a model with more layers."""

import dataclasses
from typing import Any

import jax

from stackjax.growth.axis_map import AxisMap
from stackjax.growth.base import Order, Preservation, check_kinds
from stackjax.growth.depth import Factor, LayerGather, check_depth, divide_depth
from stackjax.model.config import ModelConfig
from stackjax.runtime.errors import UserError
from stackjax.sharding.axes import Axes


@dataclasses.dataclass(frozen=True)
class Untie(LayerGather):
    """Gives each loop of a looped model layers of its own: 0 1, looped, becomes 0 1 0 1.

    Function-preserving: the same layers run in the same order. A source with more loops than
    `factor` keeps the others. Growing and looping are compared in arXiv:2602.16490.
    """

    factor: Factor = 2
    """Target num_layers divided by source num_layers; must divide model.loops."""

    @property
    def preserves_function(self) -> Preservation:
        return "always"

    def sources(self, depth: int) -> tuple[int, ...]:
        check_depth(self, depth * self.factor)
        return tuple(range(depth)) * self.factor

    def source_depth(self, depth: int) -> int:
        return divide_depth("Untie", depth, self.factor)

    def axis_maps(self, source: ModelConfig) -> dict[str, AxisMap]:
        if source.loops % self.factor:
            raise UserError(
                f"{self} does not fit model.loops {source.loops}; the factor must divide it."
            )
        return super().axis_maps(source)

    def source_config(self, target: ModelConfig) -> ModelConfig:
        source = super().source_config(target)
        return dataclasses.replace(source, loops=target.loops * self.factor)

    def target_config(self, source: ModelConfig) -> ModelConfig:
        sources = self.axis_maps(source)["layers"].sources
        loops = source.loops // self.factor
        target = dataclasses.replace(source, num_layers=len(sources), loops=loops)
        check_kinds(self, sources, source, target)
        return target

    def grow_moment(self, moment: Any, axes: Any, source: ModelConfig, *, order: Order) -> Any:
        """Returns copies; each has an equal share of the gradient, summed over the loops."""

        def share(leaf: jax.Array, names: Axes) -> jax.Array:
            return leaf * self.factor**-order if names.layer_axis else leaf

        grown = super().grow_moment(moment, axes, source, order=order)
        return jax.tree.map(share, grown, axes)
