"""AdamW by axis names, and the course of the learning rate over tokens."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from stackjax.axes import Axes
from stackjax.config import OptimizerConfig, Schedule


def build_optimizer(config: OptimizerConfig, axes: Any) -> optax.GradientTransformation:
    """Returns AdamW (arXiv:1711.05101) without its learning rate, which the step applies.

    Matrices decay; what reads no axis (the gain of a norm) does not.

    Args:
      axes: The `Axes` of each parameter.
    """
    is_axes = lambda node: isinstance(node, Axes)  # noqa: E731
    decays = jax.tree.map(lambda names: bool(names.reads), axes, is_leaf=is_axes)
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.epsilon),
        optax.add_decayed_weights(config.weight_decay, mask=decays),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LearningRate:
    """The learning rate of a phase: a schedule whose every number is settled."""

    peak: float
    schedule: Schedule
    horizon_tokens: int
    """Tokens after which the decay has ended, from the start of the schedule's axis."""
    first_tokens: int
    """Tokens on the schedule's axis before the first step of the phase."""
    tokens_per_step: int

    def __call__(self, step: jax.Array | int) -> jax.Array:
        """Returns the rate of a step of the phase, counted from 0."""
        # Floats, because whole runs have more tokens than an int32 can count.
        steps_done = jnp.asarray(step, jnp.float32) + 1
        tokens = float(self.first_tokens) + float(self.tokens_per_step) * steps_done
        warmup = jnp.minimum(1.0, tokens / max(float(self.schedule.warmup_tokens), 1.0))
        return self.peak * warmup * self._decay(tokens)

    def _decay(self, tokens: jax.Array) -> jax.Array:
        final, horizon = self.schedule.final_fraction, float(self.horizon_tokens)
        start = horizon - (self.schedule.decay_tokens or 0)
        if self.schedule.shape == "cosine":
            start = float(self.schedule.warmup_tokens)
        progress = jnp.clip((tokens - start) / max(horizon - start, 1.0), 0.0, 1.0)
        if self.schedule.shape == "cosine":
            return final + (1 - final) * 0.5 * (1 + jnp.cos(jnp.pi * progress))
        if self.schedule.shape == "wsd":
            return 1 - (1 - final) * progress
        return jnp.ones_like(progress)
