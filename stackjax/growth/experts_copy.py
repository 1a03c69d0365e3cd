"""Growth from experts to more experts."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from stackjax.growth.axis_map import AxisMap, gather
from stackjax.growth.base import Growth, Order, Preservation
from stackjax.growth.depth import Factor
from stackjax.growth.values import map_params
from stackjax.model.config import ModelConfig
from stackjax.model.routing_config import Routing
from stackjax.runtime.errors import UserError
from stackjax.runtime.numbers import NonNegative
from stackjax.sharding.axes import Axes


@dataclasses.dataclass(frozen=True)
class ExpertsCopy(Growth):
    """Copies every expert, with its router column.

    Expert upcycling (arXiv:2604.19835) keeps `top_k`, and so the FLOPs of a token. With
    `top_k` grown by the same factor, growth is function-preserving without noise: a token has
    all copies of its experts. Otherwise, a token's best experts are copies of one, and noise
    on the router parts them. Output matrices have a factor where the sum of shares changes.
    Moments grow by the expected gradient under equal loads of the copies.
    """

    factor: Factor = 2
    """Target num_experts divided by source num_experts."""
    top_k: Literal["keep", "grow"] = "keep"
    """Experts for each token: as before, or `factor` times as many."""
    noise: NonNegative = 0.0
    """Noise on the router, in standard deviations of the matrix. Without noise, copies of an
    expert stay equal if a token always has all of them."""

    @property
    def preserves_function(self) -> Preservation:
        return "always" if self.top_k == "grow" and not self.noise else "never"

    def is_symmetric(self, before: bool = False) -> bool:
        return before or (self.top_k == "grow" and not self.noise)

    @property
    def _top_k_factor(self) -> int:
        return self.factor if self.top_k == "grow" else 1

    def axis_maps(self, source: ModelConfig) -> dict[str, AxisMap]:
        copies = AxisMap(tuple(range(source.num_experts)) * self.factor)
        return {"experts": copies, "routes": copies}

    def source_config(self, target: ModelConfig) -> ModelConfig:
        routing = _routing_of(self, target)
        sizes = {"num_experts": target.num_experts}
        if self.top_k == "grow":
            sizes["routing.top_k"] = routing.top_k
        for name, size in sizes.items():
            if size % self.factor:
                raise UserError(
                    f"{self} cannot make model.{name} {size}: {self.factor} does not divide it."
                )
        return dataclasses.replace(
            target,
            num_experts=target.num_experts // self.factor,
            routing=dataclasses.replace(routing, top_k=routing.top_k // self._top_k_factor),
        )

    def target_config(self, source: ModelConfig) -> ModelConfig:
        routing = _routing_of(self, source)
        return dataclasses.replace(
            source,
            num_experts=source.num_experts * self.factor,
            routing=dataclasses.replace(routing, top_k=routing.top_k * self._top_k_factor),
        )

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
            if _is_output(names):
                grown *= self._output_factor(source)
            if self.noise and "routes" in names.writes and names.reads:
                noise = jax.random.normal(key, grown.shape, leaf.dtype)
                grown += self.noise * jnp.std(leaf) * noise
            return grown

        return map_params(grow, params, axes, key=key)

    def grow_moment(self, moment: Any, axes: Any, source: ModelConfig, *, order: Order) -> Any:
        maps = self.axis_maps(source)

        def grow(leaf: jax.Array, names: Axes) -> jax.Array:
            if not maps.keys() & {*names.names}:
                return leaf
            factor = 1 / self.factor
            if _is_output(names):
                factor /= self._output_factor(source)
            return factor**order * gather(leaf, names, maps)

        return jax.tree.map(grow, moment, axes)

    def _output_factor(self, source: ModelConfig) -> float:
        """Returns the factor of output matrices, from the change in the sum of shares."""
        routing = _routing_of(self, source)
        if routing.normalize:
            return 1.0
        # Scores of a softmax are `factor` times as small; those of sigmoids do not change.
        softmax = routing.score == "softmax"
        return (self.factor if softmax else 1) / self._top_k_factor


def _is_output(names: Axes) -> bool:
    """Returns whether a parameter is the experts' output matrix."""
    return "experts" in names.stacked and "expert_mlp" in names.reads


def _routing_of(growth: Growth, config: ModelConfig) -> Routing:
    """Returns the routing; UserError for a model without experts."""
    if config.routing is None or not config.num_experts:
        raise UserError(
            f"{growth} copies experts, and the model has none; begin with upcycle(EXPERTS)."
        )
    return config.routing
