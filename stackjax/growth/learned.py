"""Learned growth: linear maps from source to target, fitted before the target trains."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from stackjax.growth.axis_map import AxisMap
from stackjax.growth.base import Fit, Growth, Order
from stackjax.growth.depth import Factor, Stack
from stackjax.growth.values import key_for
from stackjax.growth.width import Ratio, WidthGrowth, WidthSplit
from stackjax.model.config import ModelConfig, axis_size
from stackjax.runtime.errors import UserError
from stackjax.runtime.numbers import Positive, Size
from stackjax.sharding.axes import Axes

_EXACT = jax.lax.Precision.HIGHEST


@dataclasses.dataclass(frozen=True)
class Learn(Growth):
    """Grows depth, width or both by linear maps, fitted to the target's loss.

    LiGO (arXiv:2303.00980), as G_learn in arXiv:2405.15319. Each target layer is
    sum_j D_j B W_j A. The width maps A and B act on channels, SwiGLU units, queries, keys and
    values; all layers share these maps. The depth map D is separate for each kind of
    parameter. The initial maps are (identity, stack): B is the identity above normal values
    with variance 1 / target size, and D stacks copies. The source is fixed during the fit.
    """

    factor: Factor = 1
    """Target num_layers divided by source num_layers."""
    embed: Ratio = 1
    """Target embed_dim divided by source embed_dim."""
    mlp: Ratio = 1
    """Target mlp_dim divided by source mlp_dim."""
    heads: Factor = 1
    """Target heads divided by source heads, for queries, keys and values."""
    fit_steps: Size = 100
    """Optimizer steps for the fit, at the start of the stage."""
    learning_rate: Positive = 1e-3
    """Constant learning rate for the fit; without weight decay."""

    def _width(self) -> WidthSplit:
        return WidthSplit(embed=self.embed, mlp=self.mlp, heads=self.heads)

    @property
    def is_fitted(self) -> bool:
        return True

    @property
    def grows_folded(self) -> bool:
        return False

    def fit(self, source: ModelConfig) -> "MapFit":
        return MapFit(self.fit_steps, self.learning_rate, self, source)

    def is_symmetric(self, before: bool = False) -> bool:
        return False

    def axis_maps(self, source: ModelConfig) -> dict[str, AxisMap]:
        if source.completep is not None and self.embed != 1:
            raise UserError(
                f"{self} grows model.embed_dim, which changes the logits under model.completep "
                f"by a factor unknown to the maps; leave out embed, or take width_split."
            )
        if source.num_experts:
            raise UserError(f"{self} has no maps for experts; grow before upcycle.")
        layers = Stack(self.factor).axis_maps(source) if self.factor > 1 else {}
        # The maps preserve no function, so a fractional ratio is possible with LayerNorm, too.
        return layers | WidthGrowth.axis_maps(self._width(), source)

    def source_config(self, target: ModelConfig) -> ModelConfig:
        return self._width().source_config(Stack(self.factor).source_config(target))

    def grow_params(
        self,
        params: Any,
        axes: Any,
        source: ModelConfig,
        *,
        key: jax.Array,
        fresh: Callable[[ModelConfig], Any],
    ) -> Any:
        return self.materialize(self.init_maps(axes, source, key=key), params, axes, source)

    def grow_moment(self, moment: Any, axes: Any, source: ModelConfig, *, order: Order) -> Any:
        raise UserError(
            "Learn mixes parameters, and nothing is known of how their moments mix; use "
            "optimizer_state 'reset'."
        )

    def init_maps(self, axes: Any, source: ModelConfig, *, key: jax.Array) -> dict[str, Any]:
        """Returns the initial maps for all growing axes, in float32."""
        target = self.target_config(source)
        maps: dict[str, Any] = {}
        sizes = {
            "embed": ((target.embed_dim,), (source.embed_dim,)),
            "mlp": ((target.mlp_dim,), (source.mlp_dim,)),
            "query": (
                (target.num_heads, target.head_dim),
                (source.num_heads, source.head_dim),
            ),
            "key": (
                (target.num_kv_heads, target.head_dim),
                (source.num_kv_heads, source.head_dim),
            ),
        }
        sizes["value"] = sizes["key"]
        for name, (rows, columns) in sizes.items():
            if rows != columns:
                below = (math.prod(rows) - math.prod(columns), math.prod(columns))
                values = jax.random.normal(key_for(name, key), below)
                identity = jnp.eye(below[1])
                matrix = jnp.concatenate([identity, values / math.sqrt(math.prod(rows))])
                maps[name] = matrix.reshape(*rows, *columns)
        if self.factor > 1:
            stack = jnp.tile(jnp.eye(source.num_layers), (self.factor, 1))
            maps["layers"] = {
                kind: jnp.stack([stack, stack]) if names.fused else stack
                for kind, names in axes.get("layers", {}).items()
            }
        return maps

    def materialize(self, maps: Any, params: Any, axes: Any, source: ModelConfig) -> Any:
        """Returns the target parameters: the maps applied to the source parameters."""

        def grow(path: Any, leaf: jax.Array, names: Axes) -> jax.Array:
            return self._grow_leaf(maps, path[-1].key, leaf, names, source)

        return jax.tree_util.tree_map_with_path(grow, params, axes)

    def _grow_leaf(
        self, maps: Any, kind: str, leaf: jax.Array, names: Axes, source: ModelConfig
    ) -> jax.Array:
        for axis, name in enumerate(names.names):
            matrix = _map_along(name, kind, maps, source)
            if matrix is not None:
                leaf = _contract(matrix, leaf, axis)
        if "layers" in names.stacked and "layers" in maps:
            # A SwiGLU's gate and value have separate depth maps.
            rule = "GJL,L...GF->J...GF" if names.fused else "JL,L...->J..."
            leaf = jnp.einsum(rule, maps["layers"][kind], leaf, precision=_EXACT)
        return leaf


def _map_along(name: str, kind: str, maps: Any, source: ModelConfig) -> jax.Array | None:
    """Returns the map [target, source] for an axis and kind of parameter, or None."""
    kind = kind.removesuffix("_bias").removesuffix("_norm")
    if name not in ("heads", "kv_heads"):
        return maps.get(name) if name != "layers" else None
    if kind != "out":
        return maps.get(kind)
    if "value" not in maps:
        return None
    # In the output projection, each query head reads the group's value.
    map_KHKH = maps["value"]
    group = source.num_heads // source.num_kv_heads
    heads = jnp.einsum("PIKH,QG->PQIKGH", map_KHKH, jnp.eye(group))
    rows, columns = map_KHKH.shape[:2], map_KHKH.shape[2:]
    return heads.reshape(rows[0] * group, rows[1], columns[0] * group, columns[1])


def _contract(matrix: jax.Array, leaf: jax.Array, axis: int) -> jax.Array:
    """Returns an array mapped along an axis; a head map also covers the next, head_dim."""
    pairs = range(matrix.ndim // 2)
    old, read = [matrix.ndim // 2 + i for i in pairs], [axis + i for i in pairs]
    grown = jnp.tensordot(matrix, leaf, axes=(old, read), precision=_EXACT)
    return jnp.moveaxis(grown, list(pairs), read)


@dataclasses.dataclass(frozen=True)
class MapFit(Fit):
    """The fit for the linear maps in `Learn`; source parameters are fixed."""

    growth: Learn
    source: ModelConfig

    def init_maps(self, axes: Any, key: jax.Array) -> Any:
        return self.growth.init_maps(axes, self.source, key=key)

    def model_params(self, params: Any, axes: Any, tokens: jax.Array) -> Any:
        fixed = jax.lax.stop_gradient(params["source"])
        return self.growth.materialize(params["maps"], fixed, axes, self.source)

    def flops(self, axes: Any) -> int:
        # Three times the forward FLOPs: an upper bound, as the source has no gradient.
        source, target, total = self.source, self.growth.target_config(self.source), 0
        for names in jax.tree.leaves(axes, is_leaf=lambda node: isinstance(node, Axes)):
            shape = {name: axis_size(source, name) for name in names.names}
            for name in (*names.reads, *names.writes, *names.stacked):
                grown = axis_size(target, name)
                if grown != shape[name]:
                    mixed = source.head_dim if name in ("heads", "kv_heads") else 1
                    total += 2 * math.prod(shape.values()) * grown * mixed
                    shape[name] = grown
        return 3 * total
