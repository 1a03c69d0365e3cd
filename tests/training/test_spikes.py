"""Loss spikes are found inside the train step, which then changes nothing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import MODELS, phase_of, random_batch, random_params

from stackjax import model
from stackjax.config import SpikeConfig
from stackjax.optimizers import AdamW
from stackjax.training.spikes import (
    SpikeStatistics,
    find_spike,
    plain_statistics,
    spike_inputs,
)
from stackjax.training.train_state import TrainState, train_step

WINDOW = 16
SKIP = SpikeConfig(action="skip", deviations=6.0, window_steps=WINDOW)
NOISE = [2.0 + 0.1 * (-1) ** i for i in range(40)]
FALLING = [10 - 0.1 * i + 0.1 * (-1) ** i for i in range(40)]


@jax.jit
def find(inputs, loss, grad_norm):
    metrics, statistics = find_spike(inputs, loss, grad_norm)
    return metrics, inputs._replace(statistics=statistics)


def spikes(losses, norms=None) -> list[int]:
    """Returns the indices of spikes in a sequence of losses, perhaps with gradient norms."""
    inputs, found = spike_inputs(SKIP, None), []
    for i, loss in enumerate(losses):
        norm = 1.0 if norms is None else norms[i]
        metrics, inputs = find(inputs, jnp.float32(loss), jnp.float32(norm))
        if metrics["is_spike"]:
            found.append(i)
    return found


CASES = {
    "noise": (NOISE, []),
    "falling loss": (FALLING, []),
    "spike": ([*NOISE, 4.0, *NOISE], [40]),
    "spikes apart": ([*NOISE, 4.0, *NOISE, 4.0, *NOISE], [40, 81]),
    "infinite": ([*NOISE, np.inf, *NOISE], [40]),
    "window not full": ([*NOISE[: WINDOW - 1], 9.0], []),
    "window full": ([*NOISE[:WINDOW], 9.0], [WINDOW]),
    "downward": ([*NOISE, 0.0], []),
}


@pytest.mark.parametrize(("losses", "expected"), CASES.values(), ids=CASES)
def test_spikes_are_far_above_the_running_mean(losses, expected):
    assert spikes(losses) == expected


def test_gradient_norm_alone_is_a_spike():
    assert spikes([*NOISE, 2.0], [*NOISE, 50.0]) == [40]


def test_lasting_rise_is_accepted_within_a_window():
    found = spikes([*NOISE, *(3 + value for value in NOISE)])
    assert found[0] == 40
    assert found[-1] < 40 + WINDOW


def test_statistics_survive_a_checkpoint():
    inputs = spike_inputs(SKIP, None)
    for loss in NOISE:
        _, inputs = find(inputs, jnp.float32(loss), jnp.float32(1.0))
    saved = plain_statistics(inputs)
    assert isinstance(saved, SpikeStatistics)
    restored = spike_inputs(SKIP, saved)
    for again, before in zip(jax.tree.leaves(restored), jax.tree.leaves(inputs), strict=True):
        np.testing.assert_array_equal(again, before)


def test_no_statistics_without_an_action():
    assert spike_inputs(SpikeConfig(), None) is None
    assert plain_statistics(None) is None


def test_step_with_spike_changes_only_the_step_count():
    config = MODELS["gqa"]
    phase = phase_of(config)
    tx = AdamW(peak_learning_rate=1e-2).build(model.logical_axes(config))
    params = random_params(config)
    # Not new, so that unchanged moments differ from fresh moments.
    moments = jax.jit(lambda: jax.tree.map(lambda moment: moment + 1, tx.init(params)))()
    state = TrainState(jnp.int32(3), params, moments)
    step = jax.jit(functools.partial(train_step, phase, tx, 0.0))
    plain, without = step(phase.step_inputs, state, random_batch())
    never = spike_inputs(SKIP, None)
    always = spike_inputs(SKIP, SpikeStatistics(num_steps=99.0))  # all limits are 0
    taken, metrics = step(phase.step_inputs._replace(spikes=never), state, random_batch())
    skipped, found = step(phase.step_inputs._replace(spikes=always), state, random_batch())
    assert (bool(metrics["is_spike"]), bool(found["is_spike"])) == (False, True)
    assert "is_spike" not in without
    assert (int(taken.step), int(skipped.step)) == (4, 4)
    assert_close(taken, plain)
    jax.tree.map(np.testing.assert_array_equal, skipped.params, state.params)
    jax.tree.map(np.testing.assert_array_equal, skipped.opt_state, state.opt_state)
    changes = jax.tree.map(lambda new, old: np.max(np.abs(new - old)) > 0, taken.params, params)
    assert any(jax.tree.leaves(changes))


def assert_close(tree, other):
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), tree, other)
