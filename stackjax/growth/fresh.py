"""New layers with initial values."""

import dataclasses
from collections.abc import Callable
from typing import Annotated, Any

import jax

from stackjax.growth.axis_map import NEW
from stackjax.growth.depth import NewLayers, check_depth
from stackjax.growth.values import fill_all_new
from stackjax.model.config import MAX_LAYERS, ModelConfig
from stackjax.runtime.errors import UserError
from stackjax.runtime.ranges import Whole


@dataclasses.dataclass(frozen=True)
class DepthFresh(NewLayers):
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
        copies = super().grow_params(params, axes, source, key=key, fresh=fresh)
        values = fresh(self.target_config(source))
        return fill_all_new(copies, axes, self.axis_maps(source), values, zero_writers=False)
