"""The state of training, and the pure functions that make, step, grow and judge it."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from stackjax import model
from stackjax.data.batch import Batch
from stackjax.growth import Growth, grow_opt_state
from stackjax.model import LossSums, ModelConfig, Params


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What a train step reads and returns, and what a checkpoint holds."""

    step: jax.Array
    """int32: optimizer steps of the phase."""
    params: Params
    opt_state: Any


def init_state(
    config: ModelConfig, tx: optax.GradientTransformation, key: jax.Array
) -> TrainState:
    """Returns the state of a new model, sharded by axis names on the current mesh."""
    params = model.init(config, key)
    return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params))


def train_step(
    config: ModelConfig,
    tx: optax.GradientTransformation,
    learning_rate: Callable[[jax.Array], jax.Array],
    z_loss: float,
    state: TrainState,
    batch: Batch,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Returns the state after one optimizer step, and that step's metrics.

    Args:
      z_loss: Weight of the squared log-normaliser in what is minimised; the reported loss
        is without it.
      batch: Microbatches `[accumulate, B, T]`, whose gradients add up to those of the
        whole.
    """
    total_weight = jnp.sum(batch.loss_weights)

    def objective(params: Params, microbatch: Batch) -> tuple[jax.Array, jax.Array]:
        sums = model.next_token_loss(config, params, microbatch)
        nll, squared_normaliser = jax.tree.map(lambda total: total / total_weight, sums)
        return nll + z_loss * squared_normaliser, nll

    loss, grads = _accumulate(jax.grad(objective, has_aux=True), state.params, batch)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    rate = learning_rate(state.step)
    params = jax.tree.map(lambda p, update: p - rate * update, state.params, updates)
    metrics = {
        "loss": loss,
        "grad_norm": optax.tree.norm(grads),
        "learning_rate": rate,
    }
    return TrainState(state.step + 1, params, opt_state), metrics


def _accumulate(
    gradient: Callable[[Params, Batch], tuple[Params, jax.Array]],
    params: Params,
    batch: Batch,
) -> tuple[jax.Array, Params]:
    """Returns loss and gradient, summed over the microbatches."""
    first = jax.tree.map(lambda field: field[0], batch)
    grads, loss = gradient(params, first)
    if batch.tokens.shape[0] == 1:
        return loss, grads

    def add(
        sums: tuple[jax.Array, Params], microbatch: Batch
    ) -> tuple[tuple[jax.Array, Params], None]:
        grads, loss = gradient(params, microbatch)
        return jax.tree.map(jnp.add, sums, (loss, grads)), None

    rest = jax.tree.map(lambda field: field[1:], batch)
    sums, _ = jax.lax.scan(add, (loss, grads), rest)
    return sums


def eval_step(config: ModelConfig, params: Params, batch: Batch) -> tuple[LossSums, jax.Array]:
    """Returns the loss sums of one batch `[1, B, T]` and its total weight."""
    microbatch = jax.tree.map(lambda field: field[0], batch)
    sums = model.next_token_loss(config, params, microbatch)
    return sums, jnp.sum(batch.loss_weights)


def grow_state(
    growth: Growth | None,
    source: ModelConfig,
    tx: optax.GradientTransformation,
    state: TrainState,
    key: jax.Array,
) -> TrainState:
    """Returns the state at step 0 of the grown model.

    Args:
      growth: None keeps the model as it is.
      source: The config of the model that grows.
      tx: The optimizer.
      state: The source's; its optimizer state grows with the parameters, or, where it is
        None, starts afresh.
      key: Randomness of the operator.
    """
    axes = model.logical_axes(source)
    params, opt_state = state.params, state.opt_state
    if growth is not None:
        grow_key, fresh_key = jax.random.split(key)
        fresh = functools.partial(model.init, key=fresh_key)
        params = growth.grow_params(params, axes, source, key=grow_key, fresh=fresh)
        if opt_state is not None:
            opt_state = grow_opt_state(growth, opt_state, axes, source)
    if opt_state is None:
        opt_state = tx.init(params)
    return TrainState(jnp.zeros((), jnp.int32), params, opt_state)
