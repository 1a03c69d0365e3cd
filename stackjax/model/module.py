"""The base Flax module: parameters with logical axes."""

import math
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from stackjax.model.config import ModelConfig, axis_size, shape_of
from stackjax.model.parametrization import ratios, scaled
from stackjax.sharding.axes import Axes
from stackjax.sharding.partition import partition
from stackjax.sharding.platform import platform_of, target_device


class Named(flax.struct.PyTreeNode, nn.meta.AxisMetadata[jax.Array]):
    """A parameter with logical axes, during initialization."""

    value: jax.Array
    axes: Axes = flax.struct.field(pytree_node=False)

    def unbox(self) -> jax.Array:
        return self.value

    def replace_boxed(self, val: Any) -> "Named":
        return self.replace(value=val)

    def add_axis(self, index: int, params: dict[Any, Any]) -> "Named":
        raise NotImplementedError("`init` stacks the layers, not a lifted transform.")

    def remove_axis(self, index: int, params: dict[Any, Any]) -> "Named":
        raise NotImplementedError("`init` stacks the layers, not a lifted transform.")


class Module(nn.Module):
    """Base class for modules; every parameter has logical axes."""

    config: ModelConfig

    def weight(self, name: str, axes: Axes) -> jax.Array:
        """Returns a matrix parameter: float32, sharded by its axes."""
        shape = shape_of(self.config, axes)

        def init(key: jax.Array) -> Named:
            normal = jax.random.normal(key, shape, out_sharding=partition(axes))
            return Named(init_stddev(self.config, axes) * normal, axes)

        stored: Any = self.param(name, init)
        return stored

    def bias(
        self,
        name: str,
        x: jax.Array,
        axes: tuple[str, ...],
        fused: tuple[str, ...] = (),
        joins: bool | None = None,
    ) -> jax.Array:
        """Returns a bias over the last axes of `x`, broadcastable to `x`.

        Args:
          axes: The output axes.
          fused, joins: As in `Axes`.
        """
        names = Axes(writes=axes, fused=fused, bias=True, joins=joins)
        zeros = jnp.zeros(shape_of(self.config, names))
        stored: Any = self.param(name, lambda _: Named(zeros, names))
        return jnp.expand_dims(stored.astype(x.dtype), range(x.ndim - len(names.names)))

    def choice_bias(self, name: str) -> jax.Array:
        """Returns a bias for each expert, [E]; no gradient reaches it."""
        zeros = jnp.zeros(self.config.num_experts)
        stored: Any = self.param(name, lambda _: Named(zeros, Axes(writes=("routes",))))
        return stored

    def norm(
        self,
        name: str,
        x: jax.Array,
        *axes: str,
        factor: float = 1.0,
        joins: bool | None = None,
    ) -> jax.Array:
        """Returns the norm over the last axes, in the dtype of `x`.

        RMSNorm (arXiv:1910.07467), or LayerNorm (arXiv:1607.06450) with a bias.

        Args:
          axes: The normalized axes.
          factor: Multiplies the gain and the bias.
          joins: As in `Axes`.
        """
        offset = self.config.unit_offset
        shape = tuple(axis_size(self.config, axis) for axis in axes)
        start = jnp.zeros(shape) if offset else jnp.ones(shape)
        names = Axes(writes=axes, unit_offset=offset, joins=joins)
        gain: Any = self.param(name, lambda _: Named(start, names))
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        over = tuple(range(-len(axes), 0)) if len(axes) > 1 else -1
        has_bias = self.config.norm == "layer"
        if has_bias:
            wide -= jnp.mean(wide, axis=over, keepdims=True)
        mean_square = jnp.mean(jnp.square(wide), axis=over, keepdims=True)
        wide *= jax.lax.rsqrt(mean_square + self.config.norm_epsilon)
        gain = scaled(1 + gain if offset else gain, factor)
        wide *= jnp.expand_dims(gain, range(x.ndim - len(axes)))
        if has_bias:
            wide += scaled(self.bias(f"{name}_bias", wide, axes, joins=joins), factor)
        return wide.astype(x.dtype)


def init_stddev(config: ModelConfig, axes: Axes) -> float:
    """Returns the standard deviation of a matrix's initial values.

    "reference" follows the code of arXiv:2405.15319: sqrt(2 / (5 fan_in)), with fan-in
    embed_dim for embeddings, and 1 / (sqrt(fan_in) num_layers) for the output matrix of an MLP
    or an expert. "scaled" follows GPT-2: 0.02, divided by sqrt(2 num_layers) for matrices that
    write to the residual stream. With loops, num_layers is the depth.

    With CompleteP (arXiv:2505.01618), embedding and head have the deviation of the base model,
    and matrices in layers the deviation of the base model divided by the square root of the
    fan-in's ratio.
    """
    if config.completep is not None:
        is_hidden = "vocab" not in axes.names
        growth = ratios(config, axes).fan_in if is_hidden else 1.0
        return init_stddev(config.base, axes) / math.sqrt(growth)
    embeds = axes.reads in (("vocab",), ("positions",))
    depth = max(1, config.depth)  # without layers, only the shapes of a layer count
    if config.init == "scaled":
        writes_residual = axes.writes == ("embed",) and not embeds
        return 0.02 / math.sqrt(2 * depth) if writes_residual else 0.02
    fan_in = math.prod(axis_size(config, axis) for axis in axes.reads)
    if axes.reads[-1] in ("mlp", "expert_mlp"):
        return 1 / (math.sqrt(fan_in) * depth)
    return math.sqrt(2 / (5 * (config.embed_dim if embeds else fan_in)))


def compute_dtype(config: ModelConfig) -> jnp.dtype:
    """Returns the dtype of activations and matrix products on the target device."""
    if config.compute_dtype == "auto":
        on_cpu = platform_of(target_device()) == "cpu"
        return jnp.dtype(jnp.float32 if on_cpu else jnp.bfloat16)
    return jnp.dtype(config.compute_dtype)
