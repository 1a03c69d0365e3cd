"""Shrinking of all matrices, the first step of shrink and perturb."""

import dataclasses
from collections.abc import Callable
from typing import Annotated, Any

import jax

from stackjax.growth.axis_map import AxisMap
from stackjax.growth.base import Growth, Order, Preservation
from stackjax.model.config import ModelConfig
from stackjax.runtime.ranges import Real
from stackjax.sharding.axes import Axes


@dataclasses.dataclass(frozen=True)
class Shrink(Growth):
    """Multiplies every matrix by a factor; norm gains and biases do not change.

    Shrink and perturb (arXiv:1910.08475). `shrink(0.4) + width_zero(...) + noise(...)` is the
    form of shrink, zero-pad, perturb in arXiv:2605.13405. Gradients of shrunk matrices count
    as 1 / factor times as large, because the source's matrices are 1 / factor times the shrunk
    matrices.
    """

    factor: Annotated[float, Real(at_least=0.001, at_most=1)] = 0.4
    """Target matrix divided by source matrix."""

    @property
    def preserves_function(self) -> Preservation:
        return "never" if self.factor != 1 else "always"

    def axis_maps(self, source: ModelConfig) -> dict[str, AxisMap]:
        return {}

    def source_config(self, target: ModelConfig) -> ModelConfig:
        return target

    def grow_params(
        self,
        params: Any,
        axes: Any,
        source: ModelConfig,
        *,
        key: jax.Array,
        fresh: Callable[[ModelConfig], Any],
    ) -> Any:
        return self._scaled(params, axes, self.factor)

    def grow_moment(self, moment: Any, axes: Any, source: ModelConfig, *, order: Order) -> Any:
        return self._scaled(moment, axes, self.factor**-order)

    def _scaled(self, tree: Any, axes: Any, factor: float) -> Any:
        def scale(leaf: jax.Array, names: Axes) -> jax.Array:
            return factor * leaf if names.reads else leaf

        return jax.tree.map(scale, tree, axes)
