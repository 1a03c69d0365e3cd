"""AdamW is optax's, and the learning rate follows its formula over tokens."""

import dataclasses
import math

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from stackjax.axes import Axes
from stackjax.config import OptimizerConfig, Schedule
from stackjax.optimizer import LearningRate, build_optimizer

AXES = {
    "matrix": Axes(reads=("embed",), writes=("mlp",)),
    "layer gains": Axes(stacked=("layers",), writes=("embed",)),
}
IS_MATRIX = {"matrix": True, "layer gains": False}


def rate_by_hand(peak, schedule, horizon, tokens):
    """The documented schedule, with branches where the code has arithmetic."""
    final = schedule.final_fraction
    rate = 1.0
    if tokens < schedule.warmup_tokens:
        rate = tokens / schedule.warmup_tokens
    if schedule.shape == "cosine" and tokens > schedule.warmup_tokens:
        done = (tokens - schedule.warmup_tokens) / (horizon - schedule.warmup_tokens)
        rate = final + (1 - final) * (1 + math.cos(math.pi * min(done, 1))) / 2
    if schedule.shape == "wsd" and tokens > horizon - schedule.decay_tokens:
        left = (horizon - tokens) / schedule.decay_tokens
        rate = final + (1 - final) * max(left, 0)
    return peak * rate


def learning_rate(schedule, horizon, *, first=0, per_step=100) -> LearningRate:
    return LearningRate(
        peak=3e-4,
        schedule=schedule,
        horizon_tokens=horizon,
        first_tokens=first,
        tokens_per_step=per_step,
    )


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(
    shape=st.sampled_from(["cosine", "constant", "wsd"]),
    warmup=st.integers(0, 900),
    plateau=st.integers(1, 900),
    decay=st.integers(1, 900),
    unit=st.sampled_from([1, 10**9]),
    step=st.integers(0, 40),
    first=st.integers(0, 900),
)
def test_rates_follow_the_documented_formula(shape, warmup, plateau, decay, unit, step, first):
    schedule = Schedule(
        shape=shape,
        warmup_tokens=warmup * unit,
        decay_tokens=decay * unit if shape == "wsd" else None,
    )
    horizon = (warmup + plateau + decay) * unit
    rate = learning_rate(schedule, horizon, first=first * unit, per_step=100 * unit)
    tokens = first * unit + 100 * unit * (step + 1)
    expected = rate_by_hand(3e-4, schedule, horizon, tokens)
    # Tokens are float32 in the step, which a difference of two can magnify a little.
    assert float(rate(step)) == pytest.approx(expected, rel=1e-4, abs=3e-9)


@pytest.mark.parametrize("shape", ["cosine", "constant", "wsd"])
def test_past_its_horizon_a_rate_stays_where_it_ended(shape):
    schedule = Schedule(shape=shape, decay_tokens=300, final_fraction=0.25)
    rate = learning_rate(schedule, 1000)
    last = 3e-4 * (1 if shape == "constant" else 0.25)
    for step in (9, 10, 1000):
        assert float(rate(step)) == pytest.approx(last)


def test_the_first_step_already_learns_and_the_last_step_of_warmup_is_at_the_peak():
    rate = learning_rate(Schedule(shape="constant", warmup_tokens=400), 1000)
    rates = [float(rate(step)) / 3e-4 for step in range(5)]
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1, 1])


def test_a_schedule_over_the_run_continues_from_stage_to_stage():
    schedule = Schedule(warmup_tokens=200, axis="run")
    whole = learning_rate(schedule, 1000)
    second = dataclasses.replace(whole, first_tokens=400, tokens_per_step=200)
    # Twice the batch: every step of the second stage is two of the first's.
    for step in range(3):
        assert float(second(step)) == pytest.approx(float(whole(4 + 2 * step + 1)))


def random_trees(seed, count):
    rng = np.random.default_rng(seed)
    return [
        {
            "matrix": jnp.asarray(rng.normal(size=(3, 4)), jnp.float32),
            "layer gains": jnp.asarray(rng.normal(size=(2, 3)), jnp.float32),
        }
        for _ in range(count)
    ]


@pytest.mark.parametrize("clip_norm", [0.5, 1e3])
def test_steps_are_those_of_optax_adamw(clip_norm):
    config = OptimizerConfig(peak_learning_rate=0.1, clip_norm=clip_norm)
    ours = build_optimizer(config, AXES)
    theirs = optax.chain(
        optax.clip_by_global_norm(clip_norm),
        optax.adamw(0.1, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.1, mask=IS_MATRIX),
    )
    params, *gradients = random_trees(0, 6)
    expected, our_state, their_state = params, ours.init(params), theirs.init(params)
    for grads in gradients:
        updates, our_state = ours.update(grads, our_state, params)
        params = jax.tree.map(lambda p, u: p - 0.1 * u, params, updates)
        updates, their_state = theirs.update(grads, their_state, expected)
        expected = optax.apply_updates(expected, updates)
    for name in params:
        # The rate multiplies in another order: a few roundings of float32.
        np.testing.assert_allclose(params[name], expected[name], rtol=1e-5, atol=1e-6)


def test_without_gradients_matrices_decay_and_norms_stay():
    config = OptimizerConfig(peak_learning_rate=0.1, weight_decay=0.5)
    tx = build_optimizer(config, AXES)
    (params,) = random_trees(1, 1)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = tx.update(zeros, tx.init(params), params)
    np.testing.assert_array_equal(updates["matrix"], 0.5 * params["matrix"])
    np.testing.assert_array_equal(updates["layer gains"], zeros["layer gains"])


def test_gradients_are_clipped_together_by_their_global_norm():
    config = OptimizerConfig(peak_learning_rate=0.1, clip_norm=1.0, b1=0.0)
    tx = build_optimizer(config, AXES)
    params, grads = random_trees(2, 2)
    _, state = tx.update(grads, tx.init(params), params)
    norm = math.sqrt(sum(np.sum(np.square(leaf)) for leaf in grads.values()))
    (moments,) = (node for node in state if isinstance(node, optax.ScaleByAdamState))
    for name, grad in grads.items():
        # With b1 = 0 the first moment is the clipped gradient, to float32's rounding.
        np.testing.assert_allclose(moments.mu[name], grad / np.float32(norm), rtol=1e-5)
