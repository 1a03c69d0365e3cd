"""Train and evaluation steps, on one device and on meshes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import KINDS, MODELS, mesh_of, phase_of, random_batch, random_params

from stackjax import model
from stackjax.data.batch import Batch
from stackjax.data.device import batch_sharding
from stackjax.growth.moment_starts import MomentStarts
from stackjax.optimizers import AdamW, Muon
from stackjax.sharding.partition import on_mesh
from stackjax.training.learning_rate import ParameterRates
from stackjax.training.phase import Counts, Waypoint
from stackjax.training.train_state import TrainState, eval_step, init_state, train_step

CONFIG = MODELS["gqa"]
RATE = 1e-2
# Adam divides by the gradient's size and so magnifies rounding of gradients near zero. A
# large epsilon makes the update smooth in the gradient.
TX = AdamW(peak_learning_rate=RATE, epsilon=1e-2).build(model.logical_axes(CONFIG))
init_moments = jax.jit(TX.init)


@jax.jit
def first_updates(grads, params):
    return TX.update(grads, TX.init(params), params)[0]


norm_of = jax.jit(optax.tree.norm)


def initial_state(params=None) -> TrainState:
    params = jax.device_put(random_params(CONFIG)) if params is None else params
    return TrainState(jnp.int32(0), params, init_moments(params))


# The rate of step k is k * RATE.
PHASE = phase_of(CONFIG)
RISING = dataclasses.replace(
    PHASE.learning_rate, peak=25 * RATE, warmup_tokens=25.0, tokens_per_step=1.0
)
INPUTS = PHASE.step_inputs._replace(learning_rate=RISING)


def step_with_z_loss(z_loss, state, batch):
    return train_step(PHASE, TX, z_loss, INPUTS, state, batch)


compiled = jax.jit(step_with_z_loss, static_argnums=0)


def assert_same_params(tree, other, *, tolerance):
    for leaf, expected in zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(leaf, expected, rtol=0, atol=tolerance)


def test_step_applies_the_optimizer_to_the_mean_loss_gradient():
    batch = random_batch()
    state, metrics = compiled(0.1, initial_state(), batch)
    flat = Batch(*(field[0] for field in batch))

    def objective(params):
        """Returns the weighted mean loss, computed with log_softmax."""
        logits = model.apply(CONFIG, params, *flat[:3])
        log_probs = jax.nn.log_softmax(logits)[:, :-1]
        labels = jax.nn.one_hot(flat.tokens[:, 1:], logits.shape[-1], dtype=bool)
        nll = -jnp.where(labels, log_probs, 0.0).sum(-1)
        squares = jnp.square(jax.nn.logsumexp(logits, axis=-1))[:, :-1]
        weights = flat.loss_weights[:, :-1]
        mean = functools.partial(jnp.average, weights=weights)
        return mean(nll) + 0.1 * mean(squares), mean(nll)

    params = random_params(CONFIG)
    grads, loss = jax.jit(jax.grad(objective, has_aux=True))(params)
    updates = jax.device_get(first_updates(grads, params))
    expected = jax.tree.map(lambda p, u: p - RATE * u, params, updates)
    # The reported loss excludes the z-loss.
    assert float(metrics["loss"]) == pytest.approx(float(loss), rel=1e-5)
    assert float(metrics["grad_norm"]) == pytest.approx(float(norm_of(grads)), rel=1e-5)
    assert float(metrics["learning_rate"]) == pytest.approx(RATE)
    assert int(state.step) == 1
    # Float32 rounding of 1e-7, divided by epsilon and multiplied by the rate.
    assert_same_params(state.params, expected, tolerance=1e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nonfinite_step_keeps_the_parameters(value):
    params = initial_state().params
    params = {**params, "final_norm": params["final_norm"] * jnp.float32(value)}
    state, metrics = compiled(0.0, initial_state(params), random_batch())
    assert not metrics["is_finite"]
    assert not np.isfinite(float(metrics["loss"]) + float(metrics["grad_norm"]))
    assert_same_params(state.params, params, tolerance=0)
    assert compiled(0.0, initial_state(), random_batch())[1]["is_finite"]


def test_loss_of_a_repeated_batch_falls():
    state, losses = initial_state(), []
    for _ in range(25):
        state, metrics = compiled(0.0, state, random_batch())
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.5 * losses[0]
    # The learning rate belongs to the step that uses it.
    assert int(state.step) == 25
    assert float(metrics["learning_rate"]) == pytest.approx(25 * RATE)


def three_steps(accumulate, step, state, put):
    """Returns the state and loss after three steps."""
    for seed in range(3):
        batch = random_batch(seed, accumulate=accumulate)
        state, metrics = step(1e-4, state, put(batch))
    return state, float(metrics["loss"])


@pytest.mark.sample(3)
@pytest.mark.parametrize(
    ("name", "accumulate"),
    [("fsdp 8", 1), ("replica 2, fsdp 2, tensor 2", 2), ("fsdp 4, tensor 2", 1)],
)
def test_steps_match_on_every_mesh_and_compile_once(name, accumulate):
    expected, expected_loss = three_steps(
        accumulate, compiled, initial_state(), lambda batch: batch
    )
    mesh, step = mesh_of(name), jax.jit(lambda *args: step_with_z_loss(*args), static_argnums=0)
    with jax.set_mesh(mesh):
        abstract = jax.eval_shape(lambda: init_state(CONFIG, TX, jax.random.key(0)))
        layout = jax.tree.map(lambda leaf: leaf.sharding, on_mesh(abstract, mesh))
        sharding = batch_sharding(mesh)
        put = functools.partial(jax.device_put, device=sharding)
        state, loss = three_steps(
            accumulate, step, jax.device_put(initial_state(), layout), put
        )
        assert step._cache_size() == 1
        for leaf, place in zip(jax.tree.leaves(state), jax.tree.leaves(layout), strict=True):
            assert leaf.sharding.is_equivalent_to(place, leaf.ndim)
    # Three times the one-step rounding, plus sums over eight devices.
    assert loss == pytest.approx(expected_loss, rel=2e-5)
    assert_same_params(state.params, expected.params, tolerance=1e-5)


def test_phases_with_other_rates_tokens_and_moment_starts_share_one_program():
    traces = []
    late = MomentStarts(axes=(("layers", (0, 5, 5)),), embedding=5)
    early = MomentStarts(axes=(("layers", (0, 2, 2)),), embedding=2)
    phase = dataclasses.replace(PHASE, moment_starts=late)
    other_rate = dataclasses.replace(
        PHASE.learning_rate, peak=0.5, decay_start=1e11, first_tokens=9e10
    )
    other = dataclasses.replace(
        phase,
        learning_rate=other_rate,
        moment_starts=early,
        start=Counts(tokens=9 * 10**10),
        num_steps=11,
        waypoint=Waypoint(step=4, counts=Counts(tokens=9 * 10**10 + 640)),
    )

    def step(inputs, state, batch):
        traces.append(inputs)
        return train_step(phase, TX, 0.0, inputs, state, batch)

    compiled = jax.jit(step)
    found = [
        compiled(each.step_inputs, initial_state(), random_batch()) for each in (phase, other)
    ]
    assert len(traces) == 1
    rates = [float(metrics["learning_rate"]) for _, metrics in found]
    assert rates == pytest.approx([RATE, 0.5])
    alone = jax.jit(functools.partial(train_step, other, TX, 0.0))
    expected, _ = alone(other.step_inputs, initial_state(), random_batch())
    assert_same_params(found[1][0].params, expected.params, tolerance=0)


def test_evaluation_loss_equals_training_loss():
    batch = random_batch(5)
    _, metrics = compiled(0.0, initial_state(), batch)
    evaluate = jax.jit(functools.partial(eval_step, CONFIG))
    sums, weight = evaluate(initial_state().params, batch)
    assert float(weight) == batch.loss_weights.sum()
    assert float(sums.nll / weight) == pytest.approx(float(metrics["loss"]), rel=1e-5)


def frozen_phase(config, trained):
    """Returns a phase with only some layers trained."""
    rates = ParameterRates(
        source=config,
        growth=None,
        rewarm=None,
        scale_by_fan_in=False,
        trained_layers=trained,
    )
    return phase_of(config, rate=RATE, trained_layers=trained, parameter_rates=rates)


@pytest.mark.sample(3)
@pytest.mark.parametrize(
    ("name", "trained", "optimizer"),
    [
        ("gqa", (False, False, True), AdamW),
        ("gqa, tied, qk_norm", (True, False, True), AdamW),
        ("gqa", (True, False, True), Muon),
        ("like gpt-2", (False, False, True), AdamW),
    ],
)
def test_frozen_layers_are_bit_identical_and_the_rest_is_trained(name, trained, optimizer):
    config = (MODELS | KINDS)[name]
    values = optimizer(peak_learning_rate=RATE, weight_decay=0.5)
    tx = values.build(model.logical_axes(config))
    phase = frozen_phase(config, trained)
    step = jax.jit(functools.partial(train_step, phase, tx, 1e-4, phase.step_inputs))
    params = random_params(config)
    state = TrainState(jnp.int32(0), params, jax.jit(tx.init)(params))
    for seed in range(3):
        state, _ = step(state, random_batch(seed))
    state = jax.device_get(state)
    for kind, leaf in state.params["layers"].items():
        for before, after, learns in zip(params["layers"][kind], leaf, trained, strict=True):
            if learns and kind != "key_bias":  # without rotation, it has no gradient
                assert (before != after).mean() > 0.99, kind
            elif not learns:
                np.testing.assert_array_equal(after, before, err_msg=kind)
    if config.positions == "learned":
        table = "position_embedding"
        np.testing.assert_array_equal(state.params[table], params[table])
    if config.tie_head:
        assert (state.params["embedding"] != params["embedding"]).all()
    else:
        np.testing.assert_array_equal(state.params["embedding"], params["embedding"])
        assert (state.params["head"] != params["head"]).all()
    assert (state.params["final_norm"] != params["final_norm"]).all()


MIDDLE = (False, True, False)
FROZEN = frozen_phase(CONFIG, MIDDLE)
compiled_frozen = jax.jit(functools.partial(train_step, FROZEN, TX, 0.0, FROZEN.step_inputs))


def test_frozen_step_matches_a_masked_gradient():
    batch = random_batch()
    state, metrics = compiled_frozen(initial_state(), batch)
    params, flat = random_params(CONFIG), Batch(*(field[0] for field in batch))

    def objective(params):
        return model.next_token_loss(CONFIG, params, flat).objective / flat.loss_weights.sum()

    loss, grads = jax.device_get(jax.jit(jax.value_and_grad(objective))(params))
    held = {"embedding": False, "final_norm": True, "head": True}
    held["layers"] = {
        kind: np.array(MIDDLE).reshape(-1, *(1,) * (leaf.ndim - 1))
        for kind, leaf in params["layers"].items()
    }
    grads = jax.tree.map(
        lambda grad, learns: np.where(learns, grad, np.float32(0)), grads, held
    )
    updates = jax.device_get(first_updates(grads, params))
    expected = jax.tree.map(
        lambda p, u, learns: np.where(learns, p - RATE * u, p), params, updates, held
    )
    assert float(metrics["loss"]) == pytest.approx(float(loss), rel=1e-5)
    assert float(metrics["grad_norm"]) == pytest.approx(float(norm_of(grads)), rel=1e-5)
    # Float32 rounding of 1e-7, divided by epsilon and multiplied by the rate.
    assert_same_params(state.params, expected, tolerance=1e-6)


@pytest.mark.slow
def test_frozen_step_matches_on_a_mesh():
    expected, _ = compiled_frozen(initial_state(), random_batch())
    mesh = mesh_of("replica 2, fsdp 2, tensor 2")
    with jax.set_mesh(mesh):
        abstract = jax.eval_shape(lambda: init_state(CONFIG, TX, jax.random.key(0)))
        layout = jax.tree.map(lambda leaf: leaf.sharding, on_mesh(abstract, mesh))
        batch = jax.device_put(random_batch(), batch_sharding(mesh))
        state, _ = compiled_frozen(jax.device_put(initial_state(), layout), batch)
    # Float32 rounding of 1e-7, divided by epsilon and multiplied by the rate.
    assert_same_params(state.params, expected.params, tolerance=1e-6)
