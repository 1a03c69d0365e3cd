"""New layers with initial values."""

import dataclasses
from collections.abc import Callable
from typing import Annotated, Any

import jax
import numpy as np

from stackjax.growth.axis_map import NEW, new_indices, zero_new
from stackjax.growth.base import Order
from stackjax.growth.depth import LayerGather, check_depth
from stackjax.growth.values import fill_new
from stackjax.model.config import MAX_LAYERS, ModelConfig
from stackjax.runtime.errors import UserError
from stackjax.runtime.ranges import Whole
from stackjax.sharding.axes import Axes


@dataclasses.dataclass(frozen=True)
class DepthFresh(LayerGather):
    """Adds initialized layers on top: 0 1 becomes 0 1 and new layers.

    The random initialization of zero/one-layer progressive training (arXiv:2511.04981). A
    source with 0 layers has only embedding, final norm and head.
    """

    layers: Annotated[int, Whole(at_least=1, at_most=MAX_LAYERS)]
    """Number of new layers."""

    def is_symmetric(self, before: bool = False) -> bool:
        return False

    def sources(self, depth: int) -> tuple[int, ...]:
        check_depth(self, depth + self.layers)
        return (*range(depth), *(NEW,) * self.layers)

    def source_depth(self, depth: int) -> int:
        if depth < self.layers:
            raise UserError(
                f"{self} cannot make model.num_layers {depth}, which is less than its "
                f"{self.layers} new layers."
            )
        return depth - self.layers

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

        def fill(copy: jax.Array, names: Axes, fresh: jax.Array) -> jax.Array:
            return fill_new(copy, names, maps, fresh)

        return jax.tree.map(fill, copies, axes, fresh(self.target_config(source)))

    def unknown_moments(self, source: ModelConfig) -> dict[str, np.ndarray]:
        return new_indices(self.axis_maps(source))

    def grow_moment(self, moment: Any, axes: Any, source: ModelConfig, *, order: Order) -> Any:
        maps = self.axis_maps(source)
        return zero_new(super().grow_moment(moment, axes, source, order=order), axes, maps)
