"""CompleteP (arXiv:2505.01618): factors from a model's sizes, relative to the base model.

With ratios m_L for the depth and m_N for channels, a residual branch has the factor 1 / m_L,
the logits have the factor 1 / m_N, and attention logits change as 1 / head_dim. The factors of
optimizers follow from the `Ratios` of each parameter. Without CompleteP, all factors are 1.
"""

import dataclasses
import math
from typing import Any

import jax

from stackjax.model.config import ModelConfig, axis_size
from stackjax.sharding.axes import Axes


@dataclasses.dataclass(frozen=True)
class Ratios:
    """Sizes relative to the base model, for a parameter."""

    layers: float
    """Depth of the model (m_L)."""
    embed: float
    """Channels of the model (m_N)."""
    fan_in: float
    """Inputs of the matrix; 1 for other parameters."""
    fan_out: float
    """Outputs of the parameter."""
    largest_fan: float
    """The larger one of inputs and outputs, relative to the larger one in the base model."""


def ratios(config: ModelConfig, axes: Axes) -> Ratios:
    """Returns a parameter's sizes relative to the base model."""
    base = config.base

    def fans(model: ModelConfig) -> tuple[int, int]:
        sides = (axes.reads, axes.writes)
        fan_in, fan_out = (math.prod(axis_size(model, name) for name in side) for side in sides)
        return fan_in, fan_out

    (fan_in, fan_out), (base_in, base_out) = fans(config), fans(base)
    return Ratios(
        layers=1 / branch_factor(config),
        embed=config.embed_dim / base.embed_dim,
        fan_in=fan_in / base_in,
        fan_out=fan_out / base_out,
        largest_fan=max(fan_in, fan_out) / max(base_in, base_out),
    )


def all_ratios(config: ModelConfig, axes: Any) -> Any:
    """Returns the `Ratios` of each parameter.

    Args:
      axes: The `Axes` of each parameter.
    """
    return jax.tree.map(
        lambda names: ratios(config, names), axes, is_leaf=lambda node: isinstance(node, Axes)
    )


def branch_factor(config: ModelConfig) -> float:
    """Returns the factor of attention and MLP outputs: 1 / m_L."""
    return max(1, config.base.depth) / max(1, config.depth)  # without layers, no branch has it


def logits_factor(config: ModelConfig) -> float:
    """Returns the factor of the logits: 1 / m_N."""
    return config.base.embed_dim / config.embed_dim


def query_factor(config: ModelConfig) -> float:
    """Returns the factor of the queries.

    With the attention scale 1 / sqrt(head_dim), attention logits are then proportional to 1 /
    head_dim, and unchanged for the base head_dim.
    """
    return math.sqrt(config.base.head_dim / config.head_dim)


def fold_factor(config: ModelConfig, axes: Axes) -> float:
    """Returns a parameter's factor in the standard model with the same function.

    The factors are multiplied into residual writers and their biases, query projections (or,
    for `qk_norm`, the gains of queries and keys alike), and the head; for a tied head, into the
    final norm.
    """
    if axes.layer_axis is None:
        is_last = not axes.reads if config.tie_head else axes.writes == ("vocab",)
        return logits_factor(config) if is_last else 1.0
    if (axes.reads or axes.joins) and axes.writes == ("embed",):
        return branch_factor(config)
    if config.qk_norm:
        return math.sqrt(query_factor(config)) if axes.writes == ("head_dim",) else 1.0
    return query_factor(config) if "heads" in axes.writes else 1.0


def scaled(x: jax.Array, factor: float) -> jax.Array:
    """Returns an array times a factor, in the array's dtype; the same array for 1."""
    return x if factor == 1 else factor * x
