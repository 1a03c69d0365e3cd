"""Growth from MLPs to experts."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from stackjax.growth.axis_map import NEW, AxisMap
from stackjax.growth.base import Growth, Order, Preservation
from stackjax.growth.values import key_for
from stackjax.model.config import ModelConfig, shape_of
from stackjax.model.routing_config import Routing
from stackjax.runtime.errors import UserError
from stackjax.runtime.numbers import Share, Size
from stackjax.sharding.axes import Axes


@dataclasses.dataclass(frozen=True)
class Upcycle(Growth):
    """Turns every MLP into experts: copies of the MLP, with a new router.

    Sparse upcycling (arXiv:2212.05055). With `granularity` G, an expert is one of G slices of a
    copy, and the slices of a copy have equal router columns: virtual groups
    (arXiv:2410.07524). A token's output is the MLP's output if its shares sum to 1 and it has
    whole copies. So growth is function-preserving with `normalize` or all experts for every
    token, with `top_k` a multiple of G, and without `drop`. Output matrices are multiplied by
    G, and by what the shares of a new router lack to 1.

    The routing besides `top_k` and `normalize` is the source's `model.routing`, if it has one.
    Moments grow by the expected gradient under equal loads; moments of routers are zero.
    """

    experts: Size
    """Target num_experts."""
    top_k: Size = 2
    """Experts for each token."""
    granularity: Size = 1
    """Source mlp_dim divided by target expert_dim."""
    drop: Share = 0.0
    """Share of each expert's units with new random weights, of the old weights' mean and
    deviation (Drop-Upcycling, arXiv:2502.19261). A dropped unit loses gate, value and output;
    the paper's code draws the three apart."""
    normalize: bool = True
    """Whether a token's shares sum to 1."""

    def __post_init__(self):
        super().__post_init__()
        if self.experts % self.granularity:
            raise UserError(
                f"{self} makes {self.experts} experts from slices of whole MLPs; choose a "
                f"multiple of granularity {self.granularity}."
            )
        if self.top_k > self.experts:
            raise UserError(f"{self} has top_k {self.top_k}; at most all experts fit.")

    @property
    def preserves_function(self) -> Preservation:
        is_one = self.normalize or self.top_k == self.experts
        has_whole_copies = self.top_k % self.granularity == 0
        return "always" if is_one and has_whole_copies and not self.drop else "never"

    def is_symmetric(self, before: bool = False) -> bool:
        return before

    def axis_maps(self, source: ModelConfig) -> dict[str, AxisMap]:
        return {
            "experts": AxisMap((0,) * self.experts),
            "routes": AxisMap((NEW,) * self.experts),
        }

    def source_config(self, target: ModelConfig) -> ModelConfig:
        units = target.expert_dim * self.granularity
        wanted = {
            "num_experts": (target.num_experts, self.experts),
            "num_shared_experts": (target.num_shared_experts, 0),
            "mlp_dim": (target.mlp_dim, units),
        }
        for name, (found, value) in wanted.items():
            if found != value:
                raise UserError(
                    f"{self} cannot make model.{name} {found}; with model.expert_dim "
                    f"{target.expert_dim}, it must be {value}."
                )
        if target.is_mixed:
            raise UserError(
                f"{self} makes experts in all layers, and some kinds in model.pattern are "
                f"dense; leave out their `dense`."
            )
        assert target.routing is not None, "a config with experts has a routing"
        if self._routing(target) != target.routing:
            raise UserError(
                f"{self} cannot make model.routing with top_k {target.routing.top_k} and "
                f"normalize {target.routing.normalize}; let both agree."
            )
        return dataclasses.replace(target, num_experts=0, expert_dim=0)

    def target_config(self, source: ModelConfig) -> ModelConfig:
        if source.num_experts:
            raise UserError(
                f"{self} makes experts from MLPs, and the model has {source.num_experts} "
                f"experts already; experts_copy(2) copies experts."
            )
        if source.mlp_dim % self.granularity:
            raise UserError(
                f"{self} does not fit model.mlp_dim {source.mlp_dim}: granularity does not "
                f"divide it."
            )
        return dataclasses.replace(
            source,
            num_experts=self.experts,
            expert_dim=source.mlp_dim // self.granularity,
            routing=self._routing(source),
        )

    def _routing(self, config: ModelConfig) -> Routing:
        """Returns the target's routing; UserError if the shares have no expected sum."""
        routing = config.routing or Routing(top_k=self.top_k)
        if routing.score == "sigmoid" and not self.normalize:
            raise UserError(
                f"{self} has normalize False, and model.routing.score is 'sigmoid'; upcycling "
                f"normalizes sigmoid scores."
            )
        return dataclasses.replace(routing, top_k=self.top_k, normalize=self.normalize)

    def origins(self, source: ModelConfig) -> dict[str, str]:
        after = source.norm_placement == "after"
        norm = "attention_out_norm" if after else "attention_norm"
        found = {"expert_gate_up": "gate_up", "expert_down": "down", "router": "down"}
        if self._routing(source).balance == "bias":
            # Optimizers treat the bias as they treat a norm's gain.
            found |= {norm: norm, "router_bias": norm}
        return found

    def grow_params(
        self,
        params: Any,
        axes: Any,
        source: ModelConfig,
        *,
        key: jax.Array,
        fresh: Callable[[ModelConfig], Any],
    ) -> Any:
        new = fresh(self.target_config(source))

        def grow(leaf: jax.Array, names: Axes, target: Axes, fresh: jax.Array) -> jax.Array:
            if target == names:
                return leaf
            if "experts" not in target.stacked:
                columns = fresh[..., :: self.granularity]
                return jnp.repeat(columns, self.granularity, axis=-1).astype(leaf.dtype)
            grown = self._spread(leaf, names, target)
            if "expert_mlp" in target.reads:
                grown *= self._output_factor(source)
            return self._redrawn(grown, target, key) if self.drop else grown

        return self._map(grow, params, axes, source, new)

    def grow_moment(self, moment: Any, axes: Any, source: ModelConfig, *, order: Order) -> Any:
        config = self.target_config(source)

        def grow(leaf: jax.Array, names: Axes, target: Axes) -> jax.Array:
            if target == names:
                return leaf
            if "experts" not in target.stacked:
                return jnp.zeros(shape_of(config, target), leaf.dtype)
            factor = self.granularity / self.experts
            if "expert_mlp" in target.reads:
                factor /= self._output_factor(source)
            return factor**order * self._spread(leaf, names, target)

        return self._map(grow, moment, axes, source)

    def _map(
        self, grow: Callable[..., Any], tree: Any, axes: Any, source: ModelConfig, *rest: Any
    ) -> Any:
        """Returns `grow(origin's leaf, its axes, axes, *rest)` for each target parameter."""
        origin, names = self.target_tree(tree, source), self.target_tree(axes, source)
        return jax.tree.map(grow, origin, names, self.target_axes(axes, source), *rest)

    def unknown_moments(self, source: ModelConfig) -> dict[str, Any]:
        return {"routes": self.axis_maps(source)["routes"].is_new}

    def _output_factor(self, source: ModelConfig) -> float:
        """Returns the factor of output matrices."""
        sum_of_shares = 1.0 if self.normalize else self.top_k / self.experts
        return self.granularity / (sum_of_shares * self._routing(source).scale)

    def _spread(self, leaf: jax.Array, names: Axes, target: Axes) -> jax.Array:
        """Returns the slices of an MLP's matrix, repeated along the axis of experts."""
        units, place = names.names.index("mlp"), target.names.index("experts")
        shape = (*leaf.shape[:units], self.granularity, -1, *leaf.shape[units + 1 :])
        slices = jnp.moveaxis(leaf.reshape(shape), units, place)
        return jnp.concatenate([slices] * (self.experts // self.granularity), axis=place)

    def _redrawn(self, grown: jax.Array, names: Axes, key: jax.Array) -> jax.Array:
        """Returns a matrix with normal values in dropped units, as the old ones of each map."""
        # The key has no parameter's name: all matrices of an expert lose the same units.
        units = names.names.index("expert_mlp")
        shape = [1] * grown.ndim
        for axis in (*range(len(names.stacked)), units):
            shape[axis] = grown.shape[axis]
        rank = jnp.argsort(jax.random.uniform(key_for("dropped units", key), shape), axis=units)
        is_dropped = rank < round(self.drop * grown.shape[units])
        over = tuple(names.names.index(name) for name in (*names.reads, *names.writes))
        mean = jnp.mean(grown, over, keepdims=True, where=is_dropped)
        deviation = jnp.std(grown, over, keepdims=True, where=is_dropped)
        noise = jax.random.normal(key_for(str(names), key), grown.shape, grown.dtype)
        return jnp.where(is_dropped, mean + deviation * noise, grown)
