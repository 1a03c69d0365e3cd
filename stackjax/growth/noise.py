"""Noise for the function-preservation ablation."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax

from stackjax.growth.axis_map import AxisMap
from stackjax.growth.base import Growth, Preservation
from stackjax.growth.values import map_params, writes_channels
from stackjax.model.config import ModelConfig
from stackjax.model.parametrization import ratios
from stackjax.runtime.numbers import Share
from stackjax.sharding.axes import Axes


@dataclasses.dataclass(frozen=True)
class Noise(Growth):
    """Mixes noise into every matrix W: (1 - alpha) W + alpha e. Use last in a chain.

    Equations 53 and 54 in arXiv:2405.15319. With d channels, e is normal with variance
    1 / (d layers^2) for residual writers inside layers, and 2 / (5 d) for other matrices. Under
    CompleteP, e has the variance for the base model, with the factors of initial values.
    """

    alpha: Share = 0.2
    """Noise share, from 0 to 1."""

    @property
    def preserves_function(self) -> Preservation:
        return "never" if self.alpha else "always"

    @property
    def grows_folded(self) -> bool:
        return False

    def is_symmetric(self, before: bool = False) -> bool:
        return before and not self.alpha

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
        def mix(leaf: jax.Array, names: Axes, key: jax.Array) -> jax.Array:
            if not names.reads:
                return leaf
            base = source.base
            stddev = math.sqrt(2 / (5 * base.embed_dim))
            if names.stacked and writes_channels(names):
                stddev = 1 / (math.sqrt(base.embed_dim) * max(1, base.depth))
            if names.stacked:
                stddev /= math.sqrt(ratios(source, names).fan_in)
            noise = stddev * jax.random.normal(key, leaf.shape, leaf.dtype)
            return (1 - self.alpha) * leaf + self.alpha * noise

        return map_params(mix, params, axes, key=key)
