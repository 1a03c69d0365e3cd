"""Learning-rate schedules over tokens, and learning-rate factors per parameter."""

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp

from stackjax.config import Rewarm
from stackjax.growth import Growth
from stackjax.growth.axis_map import is_new
from stackjax.growth.moment_starts import learns
from stackjax.model.config import ModelConfig, axis_size
from stackjax.model.parametrization import ratios
from stackjax.optimizers import Optimizer
from stackjax.sharding.axes import Axes


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class LearningRate:
    """A phase's learning-rate schedule, over tokens.

    A pytree: all numbers are inputs to a compiled step, so no number needs a new program. Token
    counts are floats, because an int32 is too small for long runs.
    """

    shape: Literal["cosine", "constant", "wsd"] = dataclasses.field(metadata={"static": True})
    peak: float
    warmup_tokens: float
    decay_start: float
    """Tokens before the decay."""
    decay_tokens: float
    """Tokens during the decay."""
    final_fraction: float
    """Rate after the decay, as a fraction."""
    first_tokens: float
    """Tokens before the phase's first step."""
    tokens_per_step: float

    @property
    def horizon_tokens(self) -> float:
        """Tokens until the decay ends."""
        return self.decay_start + self.decay_tokens

    def __call__(self, step: jax.Array | int) -> jax.Array:
        """Returns the rate for a step in the phase, counted from 0."""
        steps_done = jnp.asarray(step, jnp.float32) + 1
        tokens = self.first_tokens + self.tokens_per_step * steps_done
        # Reciprocals, as XLA computes for constants: equal bits either way.
        warmup = jnp.minimum(1.0, tokens * (1.0 / jnp.maximum(self.warmup_tokens, 1.0)))
        return self.peak * warmup * self._decay(tokens)

    def _decay(self, tokens: jax.Array) -> jax.Array:
        final, per_token = self.final_fraction, 1.0 / jnp.maximum(self.decay_tokens, 1.0)
        progress = jnp.clip((tokens - self.decay_start) * per_token, 0.0, 1.0)
        if self.shape == "cosine":
            return final + (1 - final) * 0.5 * (1 + jnp.cos(jnp.pi * progress))
        if self.shape == "wsd":
            return 1 - (1 - final) * progress
        return jnp.ones_like(progress)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParameterRates:
    """Learning-rate factors per parameter in a phase."""

    source: ModelConfig
    growth: Growth | None
    """Growth from `source` to the phase's model."""
    rewarm: Rewarm | None
    scale_by_fan_in: bool
    trained_layers: tuple[bool, ...] | None
    """Trained layers; None for all parameters."""
    optimizer: Optimizer | None = None
    """The optimizer, whose rule has CompleteP's factors; None without CompleteP."""

    @property
    def target(self) -> ModelConfig:
        """The phase's model."""
        return self.growth.target_config(self.source) if self.growth else self.source

    def __call__(self, axes: Any, tokens: jax.Array) -> Any:
        """Returns a factor for each parameter, for broadcasting.

        Args:
          axes: The `Axes` of each parameter.
          tokens: Tokens since growth; a float32 scalar.
        """
        return jax.tree.map(
            functools.partial(self._factor, tokens),
            axes,
            is_leaf=lambda node: isinstance(node, Axes),
        )

    def _factor(self, tokens: jax.Array, names: Axes) -> jax.Array:
        factor = jnp.ones((1,) * len(names.names))
        if self.rewarm is not None and self.growth is not None:
            maps = self.growth.axis_maps(self.source)
            risen = jnp.minimum(1.0, tokens / float(self.rewarm.tokens))
            factor *= jnp.where(is_new(names, maps), self.rewarm.ratio * risen, 1.0)
        if self.scale_by_fan_in and self.growth is not None:
            for name in names.reads:
                factor *= axis_size(self.source, name) / axis_size(self.target, name)
        if self.optimizer is not None:
            factor *= self.optimizer.rate_factor(names, ratios(self.target, names))
        if self.trained_layers is not None:
            factor *= learns(names, self.trained_layers, self.target)
        return factor
