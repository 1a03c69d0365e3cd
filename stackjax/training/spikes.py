"""Loss spikes: a running mean and deviation, updated inside the train step."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from stackjax.config import SpikeConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SpikeStatistics:
    """Running statistics of a phase's steps; saved in checkpoints."""

    num_steps: float = 0.0
    loss_mean: float = 0.0
    loss_variance: float = 0.0
    grad_norm_mean: float = 0.0
    grad_norm_variance: float = 0.0


class SpikeInputs(NamedTuple):
    """Inputs for the train step: all are float32 scalars."""

    deviations: Any
    window: Any
    """Steps in the running statistics."""
    statistics: SpikeStatistics


def spike_inputs(config: SpikeConfig, saved: SpikeStatistics | None) -> SpikeInputs | None:
    """Returns a phase's first inputs, as NumPy scalars; None if spikes are ignored.

    Args:
      saved: A checkpoint's statistics; None at the start of a phase.
    """
    if config.action == "ignore":
        return None
    inputs = SpikeInputs(config.deviations, config.window_steps, saved or SpikeStatistics())
    return jax.tree.map(np.float32, inputs)


def find_spike(
    inputs: SpikeInputs, loss: jax.Array, grad_norm: jax.Array
) -> tuple[dict[str, Any], SpikeStatistics]:
    """Returns the step's spike metrics, and the statistics with this step.

    A step is a spike if the loss or the gradient norm is above mean + `deviations` x standard
    deviation of the last `window` steps, exponentially weighted. No step is a spike before
    the window is full. A spike enters the statistics at its limit, so a single spike hardly
    moves them, and a lasting rise is accepted after some steps.
    """
    before = inputs.statistics
    is_full = before.num_steps >= inputs.window
    weight = 1 / jnp.minimum(before.num_steps + 1, inputs.window)

    def limit(mean: Any, variance: Any) -> jax.Array:
        return jnp.where(is_full, mean + inputs.deviations * jnp.sqrt(variance), jnp.inf)

    def after(mean: Any, variance: Any, value: jax.Array) -> tuple[Any, Any]:
        difference = value - mean
        return (
            mean + weight * difference,
            (1 - weight) * (variance + weight * difference**2),
        )

    loss_limit = limit(before.loss_mean, before.loss_variance)
    grad_norm_limit = limit(before.grad_norm_mean, before.grad_norm_variance)
    statistics = SpikeStatistics(
        before.num_steps + 1,
        *after(before.loss_mean, before.loss_variance, jnp.minimum(loss, loss_limit)),
        *after(
            before.grad_norm_mean,
            before.grad_norm_variance,
            jnp.minimum(grad_norm, grad_norm_limit),
        ),
    )
    metrics = {
        "loss_limit": loss_limit,
        "grad_norm_limit": grad_norm_limit,
        "is_spike": (loss > loss_limit) | (grad_norm > grad_norm_limit),
    }
    return metrics, statistics


def plain_statistics(inputs: SpikeInputs | None) -> SpikeStatistics | None:
    """Returns the statistics as Python numbers; None if spikes are ignored."""
    if inputs is None:
        return None
    return jax.tree.map(lambda each: float(np.asarray(each)), inputs.statistics)
