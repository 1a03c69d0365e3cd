"""The training state, and pure functions to create, step, grow and evaluate a state."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from stackjax import model
from stackjax.data.batch import Batch
from stackjax.growth import Growth, OptimizerState, grow_opt_state, zero_where
from stackjax.growth.base import Fit
from stackjax.growth.grow_tree import axes_of, grow_tree
from stackjax.growth.moments import check_moments
from stackjax.model import LossSums, ModelConfig, Params
from stackjax.model.router import RouterSums, router_metrics, router_shapes
from stackjax.sharding.host_memory import on_device, on_host
from stackjax.sharding.partition import auto_sharded, partition_of
from stackjax.training.gradients import LOSS, sum_gradients
from stackjax.training.phase import Phase, StepInputs
from stackjax.training.router_bias import with_balanced_biases
from stackjax.training.spikes import find_spike


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """A train step's input and output, saved in checkpoints."""

    step: jax.Array
    """int32: optimizer steps in the phase."""
    params: Params
    opt_state: Any


def init_state(
    config: ModelConfig, tx: optax.GradientTransformation, key: jax.Array
) -> TrainState:
    """Returns a new model's state, sharded by axis names on the current mesh."""
    params = model.init(config, key)
    return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params))


def train_step(
    phase: Phase,
    tx: optax.GradientTransformationExtraArgs,
    z_loss: float,
    inputs: StepInputs,
    state: TrainState,
    batch: Batch,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Returns the state after an optimizer step, and the step's metrics.

    If the loss or the gradient norm is not finite, the parameters do not change, the optimizer
    moments may not be finite, and the metric `is_finite` is false. With `inputs.spikes`,
    parameters and moments do not change in a loss spike, the metric `is_spike` is true, and
    the metric `spikes` is the next step's `inputs.spikes`.

    Args:
      phase: The model and the trained layers.
      tx: The optimizer without learning rate. Moment starts are an extra argument.
      z_loss: Weight of the squared log-normalizer in the minimized loss; the reported loss is
        without it, and without the routers' losses.
      inputs: The phase's learning rate, tokens and moment starts.
      batch: Microbatches `[accumulate, B, T]`; their gradients are added.
    """
    # To divide the loss instead would take a pass over the head's gradient.
    shares = batch.loss_weights / jnp.sum(batch.loss_weights)
    batch = batch._replace(loss_weights=shares)

    def objective(
        params: Params, tokens: jax.Array, microbatch: Batch
    ) -> tuple[jax.Array, tuple[jax.Array, RouterSums | None]]:
        run = phase.model_params(params, tokens)
        sums = model.next_token_loss(
            phase.model, run, microbatch, z_loss=z_loss, spans=phase.spans
        )
        return sums.objective, (sums.nll, sums.router)

    tokens = phase.tokens(state.step, inputs.first_tokens)
    gradient = jax.grad(objective, has_aux=True)
    like = LOSS, router_shapes(phase.model)
    (loss, router), grads = sum_gradients(gradient, state.params, tokens, batch, like)
    grad_norm = optax.tree.norm(grads)
    is_finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    moments = state.opt_state
    if phase.moment_memory == "host":
        moments = on_device(moments)
    updates, opt_state = tx.update(
        grads, moments, state.params, moment_starts=inputs.moment_starts
    )
    rate = inputs.learning_rate(state.step)
    tokens = phase.tokens(state.step + 1, inputs.first_tokens)
    stepped = phase.step_params(state.params, updates, rate, tokens)
    if router is not None:
        stepped = with_balanced_biases(phase, stepped, router)
    is_taken = is_finite
    spike_metrics: dict[str, Any] = {}
    if inputs.spikes is not None:
        spike_metrics, statistics = find_spike(inputs.spikes, loss, grad_norm)
        is_taken &= ~spike_metrics["is_spike"]
        spike_metrics["spikes"] = inputs.spikes._replace(statistics=statistics)
        opt_state = _choose(is_taken, opt_state, moments)
    # Without spikes only parameters: a choice between moments may store two copies.
    params = _choose(is_taken, stepped, state.params)
    metrics = {
        "loss": loss,
        "grad_norm": grad_norm,
        "learning_rate": rate,
        "is_finite": is_finite,
        **({} if router is None else router_metrics(router)),
        **spike_metrics,
    }
    return placed(phase, TrainState(state.step + 1, params, opt_state)), metrics


def placed(phase: Phase, state: TrainState) -> TrainState:
    """Returns a state with the moments in the phase's memory, as the train step takes them."""
    if phase.moment_memory == "device":
        return state
    return dataclasses.replace(state, opt_state=on_host(state.opt_state))


def _choose(is_taken: jax.Array, new: Any, old: Any) -> Any:
    return jax.tree.map(lambda n, o: jnp.where(is_taken, n, o), new, old)


def eval_step(config: ModelConfig, params: Params, batch: Batch) -> tuple[LossSums, jax.Array]:
    """Returns the loss sums and the total weight for a batch `[1, B, T]`."""
    microbatch = jax.tree.map(lambda field: field[0], batch)
    sums = model.next_token_loss(config, params, microbatch)
    return sums, jnp.sum(batch.loss_weights)


def enter_phase(
    source: Phase,
    phase: Phase,
    tx: optax.GradientTransformation,
    state: TrainState,
    key: jax.Array,
) -> TrainState:
    """Returns a phase's state at step 0.

    Args:
      source: The previous phase.
      phase: The phase, with or without growth.
      tx: The phase's optimizer.
      state: The source's last state; optimizer state None means a fresh optimizer.
      key: Random key for growth.
    """
    params = source.model_params(state.params, source.tokens(state.step))
    if phase.fit is not None:
        return fit_state(phase.fit, phase.source, tx, params, key)
    opt_state = state.opt_state
    if source.trained_layers is not None and phase.optimizer_state != "reset":
        opt_state = zero_where(source.frozen(), opt_state)
    state = TrainState(state.step, params, opt_state)
    return grow_state(phase.growth, phase.source, tx, state, key, phase.optimizer_state)


def fit_state(
    fit: Fit,
    source: ModelConfig,
    tx: optax.GradientTransformation,
    params: Params,
    key: jax.Array,
) -> TrainState:
    """Returns the state at step 0 of a fit.

    Args:
      source: The config of the source model.
      tx: The optimizer.
      params: The source parameters.
      key: Randomness of the initial maps.
    """
    maps = fit.init_maps(model.logical_axes(source), key)
    trained = {"maps": maps, "source": params}
    return TrainState(jnp.zeros((), jnp.int32), trained, tx.init(trained))


def grow_state(
    growth: Growth | None,
    source: ModelConfig,
    tx: optax.GradientTransformation | None,
    state: TrainState,
    key: jax.Array,
    optimizer_state: OptimizerState,
) -> TrainState:
    """Returns the state at step 0 of the grown model.

    Args:
      growth: None keeps the model.
      source: The config of the source model.
      tx: The optimizer of the parameters in `state`; None leaves the optimizer state out.
      state: The source state, with all parameters or any part of the tree. The optimizer
        state can be None if it is reset.
      key: Randomness of the operator.
      optimizer_state: Reset, grow or keep the moments.
    """
    params, opt_state = state.params, state.opt_state
    if growth is not None:
        params = grow_tree(growth, source, params, key)
    if tx is None:
        opt_state = None
    elif optimizer_state == "reset":
        opt_state = tx.init(params)
    elif growth is not None:
        check_moments(opt_state, state.params)
        axes = axes_of(source, state.params)
        grow_moments = functools.partial(
            grow_opt_state, growth, axes=axes, source=source, moments=optimizer_state
        )
        layout = jax.tree.map(partition_of, jax.eval_shape(tx.init, params))
        opt_state = auto_sharded(grow_moments, layout)(opt_state)
    return TrainState(jnp.zeros((), jnp.int32), params, opt_state)
