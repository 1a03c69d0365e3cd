"""Router biases move toward equal loads, and nothing else moves them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import EXPERTS, phase_of, random_batch, random_params

from stackjax.optimizers import AdamW, Muon
from stackjax.training.compile import phase_optimizer
from stackjax.training.train_state import TrainState, train_step

CONFIG = EXPERTS["like deepseek"]
ROUTING = CONFIG.routing
# The first expert of each layer has all tokens, and the other is among the last.
BIAS_LE = np.float32([[9, 0, 0, 0, 0, 0, 0, 0]] * 3)


def step(phase, params):
    tx = phase_optimizer(phase)
    state = TrainState(jnp.int32(0), params, tx.init(params))
    run = jax.jit(functools.partial(train_step, phase, tx, 0.0, phase.step_inputs))
    state, metrics = run(state, random_batch())
    return state.params, jax.device_get(metrics)


def params_of(config):
    params = random_params(config)
    return params | {"layers": params["layers"] | {"router_bias": BIAS_LE}}


@pytest.mark.parametrize("optimizer", [AdamW, Muon])
def test_bias_of_a_loaded_expert_falls_and_of_the_others_rises(optimizer):
    phase = phase_of(CONFIG, optimizer=optimizer(peak_learning_rate=1e-2, weight_decay=0.5))
    params, metrics = step(phase, params_of(CONFIG))
    moved = params["layers"]["router_bias"] - BIAS_LE
    assert metrics["max_load"] == pytest.approx(8 / ROUTING.top_k, rel=1e-5)
    # Steps have one size; weight decay and the optimizer do not reach a bias.
    np.testing.assert_allclose(moved[:, 0], -ROUTING.bias_rate, rtol=1e-5)
    assert set(np.round(np.abs(np.asarray(moved)).ravel(), 5)) <= {0.0, np.float32(0.1)}
    assert (moved > 0).any(axis=1).all()


def test_biases_of_frozen_layers_stay():
    phase = phase_of(CONFIG, trained_layers=(True, False, True, False))
    params, _ = step(phase, params_of(CONFIG))
    moved = params["layers"]["router_bias"] - BIAS_LE
    # Layers 1, 2 and 3 have experts.
    assert (np.abs(moved).max(axis=1) > 0).tolist() == [False, True, False]


def test_rows_have_the_metrics_of_routers_only_with_experts():
    names = {"balance_loss", "router_z_loss", "router_entropy"}
    names |= {"max_load", "min_load", "layer_max_load"}
    _, metrics = step(phase_of(CONFIG), params_of(CONFIG))
    dense = phase_of(EXPERTS["experts"])
    assert names <= metrics.keys()
    assert metrics["layer_max_load"].shape == (3,)
    _, of_all = step(dense, random_params(dense.model))
    assert of_all["layer_max_load"].shape == (3,)
    assert metrics["min_load"] <= 1 <= metrics["max_load"]
