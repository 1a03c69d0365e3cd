"""Bias correction of moments that start at zero after growth.

The reference is Adam and Muon in float64 NumPy.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import (
    GROWTHS,
    MODELS,
    mesh_of,
    phase_of,
    random_batch,
    random_params,
    tiny_model,
    tiny_run,
)
from optimizers import by_name, compiled_optimizer, orthogonalized, random_like

from stackjax import model
from stackjax.config import Stage
from stackjax.growth import Learn, Stack, WidthZero, grow_opt_state
from stackjax.growth.axis_map import is_new
from stackjax.growth.moment_starts import MomentStarts
from stackjax.growth.moments import check_moments, register_moments
from stackjax.model.config import axis_size
from stackjax.optimizers import AdamW, Muon
from stackjax.runtime.errors import UserError
from stackjax.sharding.axes import Axes
from stackjax.sharding.partition import partition_of
from stackjax.training.expand import expand
from stackjax.training.train_state import TrainState, enter_phase, init_state, train_step

SOURCE = MODELS["gqa"]
ADAMW = AdamW(
    peak_learning_rate=1.0, b2=0.999, weight_decay=0.0, clip_norm=1e9, moments_dtype="float32"
)
MUON = Muon(**vars(ADAMW))
STEPS_BEFORE = 40
STEPS_AFTER = 8
KEPT = ["stack", "width zero", "chain of both"]


def adam(gradients, config):
    """Yields the float64 updates of a fresh Adam."""
    mu = nu = 0.0
    for k, grad in enumerate(gradients, 1):
        grad = np.float64(grad)
        mu = config.b1 * mu + (1 - config.b1) * grad
        nu = config.b2 * nu + (1 - config.b2) * grad**2
        yield mu / (1 - config.b1**k) / (np.sqrt(nu / (1 - config.b2**k)) + config.epsilon)


@functools.cache
def state_before(config):
    """Returns the optimizer state after STEPS_BEFORE updates of the source."""
    init, update = compiled_optimizer(SOURCE, config)
    params = random_params(SOURCE)
    state = init(params)
    for seed in range(STEPS_BEFORE):
        _, state = update(random_like(params, seed), state, params)
    return state


@functools.cache
def updates_after_growth(config, growth, starts):
    """Returns the updates after a growth with kept moments, and their gradients."""
    axes, target = model.logical_axes(SOURCE), growth.target_config(SOURCE)
    grow = functools.partial(grow_opt_state, growth, axes=axes, source=SOURCE, moments="keep")
    state = jax.jit(grow)(state_before(config))
    params = random_params(target)
    update = jax.jit(config.build(model.logical_axes(target)).update)
    gradients = [random_like(params, 100 + seed) for seed in range(STEPS_AFTER)]
    updates = []
    for grads in gradients:
        found, state = update(grads, state, params, moment_starts=starts)
        updates.append(found)
    return updates, gradients


def starts_of(growth):
    return MomentStarts().after_growth(growth, SOURCE, STEPS_BEFORE, keeps=True)


@pytest.mark.sample(3)
@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, "float32") for name in KEPT), ("stack", "bfloat16")]
)
def test_first_updates_of_new_entries_match_fresh_adam(name, dtype):
    growth = GROWTHS[name]
    b2 = 0.999 if dtype == "float32" else 0.95
    config = dataclasses.replace(ADAMW, moments_dtype=dtype, b2=b2)
    updates, gradients = updates_after_growth(config, growth, starts_of(growth))
    target, maps = growth.target_config(SOURCE), growth.axis_maps(SOURCE)
    for leaf, names in by_name(model.logical_axes(target)).items():
        fresh = list(adam([by_name(grads)[leaf] for grads in gradients], config))
        new = np.broadcast_to(is_new(names, maps), fresh[0].shape)
        for found, expected in zip(updates, fresh, strict=True):
            # In float32, 1 - 0.999 keeps 14 bits. A bfloat16 moment has 8 bits.
            tolerance = 2e-4 if dtype == "float32" else 0.02
            ours = np.asarray(by_name(found)[leaf])
            np.testing.assert_allclose(ours[new], expected[new], rtol=0, atol=tolerance)


def test_updates_of_new_entries_are_too_long_without_moment_starts():
    growth = GROWTHS["stack"]
    wrong, _ = updates_after_growth(ADAMW, growth, None)
    # (1 - b1) g / sqrt((1 - b2) g^2), divided by the old count's bias corrections.
    old = 1 - 0.999 ** (STEPS_BEFORE + 1)
    first = np.abs(by_name(wrong[0])["query"][SOURCE.num_layers :])
    expected = 0.1 / (1 - 0.9 ** (STEPS_BEFORE + 1)) / np.sqrt(0.001 / old)
    np.testing.assert_allclose(first, expected, rtol=1e-3)
    right, _ = updates_after_growth(ADAMW, growth, starts_of(growth))
    first = np.abs(by_name(right[0])["query"][SOURCE.num_layers :])
    np.testing.assert_allclose(first, 1, rtol=1e-3)


@pytest.mark.sample(3)
@pytest.mark.parametrize("name", KEPT)
def test_moment_starts_do_not_change_updates_of_old_entries(name):
    growth = GROWTHS[name]
    with_starts, _ = updates_after_growth(ADAMW, growth, starts_of(growth))
    without, _ = updates_after_growth(ADAMW, growth, None)
    maps = growth.axis_maps(SOURCE)
    for leaf, names in by_name(model.logical_axes(growth.target_config(SOURCE))).items():
        ours, theirs = (
            np.asarray(by_name(found[-1])[leaf]) for found in (with_starts, without)
        )
        old = ~np.broadcast_to(is_new(names, maps), ours.shape)
        np.testing.assert_allclose(ours[old], theirs[old], rtol=1e-6)


def test_updates_of_new_layers_match_fresh_muon():
    growth = GROWTHS["stack"]
    updates, gradients = updates_after_growth(MUON, growth, starts_of(growth))
    for layer in range(SOURCE.num_layers, 2 * SOURCE.num_layers):
        momentum = 0.0
        for k, (grads, found) in enumerate(zip(gradients, updates, strict=True), 1):
            grad = np.float64(grads["layers"]["down"][layer])
            momentum = 0.95 * momentum + 0.05 * grad
            ahead = 0.95 * momentum / (1 - 0.95 ** (k + 1)) + 0.05 * grad / (1 - 0.95**k)
            expected = 0.2 * np.sqrt(max(grad.shape)) * orthogonalized(ahead)
            # Five Newton-Schulz steps in float32; each step may triple an error.
            np.testing.assert_allclose(found["layers"]["down"][layer], expected, atol=2e-4)


def test_muon_corrects_new_entries_of_a_widened_matrix_by_their_own_count():
    growth = WidthZero(mlp=2)
    updates, gradients = updates_after_growth(MUON, growth, starts_of(growth))
    expected_momentum = 0.0
    grad = np.float64(gradients[0]["layers"]["down"][0])
    old_units = SOURCE.mlp_dim
    for seed in range(STEPS_BEFORE):
        earlier = random_like(random_params(SOURCE), seed)["layers"]["down"][0]
        expected_momentum = 0.95 * expected_momentum + 0.05 * np.float64(earlier)
    t = STEPS_BEFORE + 1
    momentum = 0.05 * grad
    momentum[:old_units] += 0.95 * expected_momentum
    counts = np.where(np.arange(len(grad)) < old_units, t, 1)[:, None]
    ahead = 0.95 * momentum / (1 - 0.95 ** (counts + 1)) + 0.05 * grad / (1 - 0.95**counts)
    expected = 0.2 * np.sqrt(max(grad.shape)) * orthogonalized(ahead)
    np.testing.assert_allclose(updates[0]["layers"]["down"][0], expected, atol=2e-4)


LINEAR = {name: g for name, g in GROWTHS.items() if not isinstance(g, Learn)}


@pytest.mark.sample(11)
@pytest.mark.parametrize("name", LINEAR)
@pytest.mark.parametrize("mode", ["grow", "keep"])
def test_moments_start_at_growth_exactly_for_zero_entries(name, mode):
    growth, every = LINEAR[name], model.logical_axes(SOURCE)
    # Parameters grow independently, so one parameter per kind is enough.
    axes = {
        "embedding": every["embedding"],
        "layers": {leaf: every["layers"][leaf] for leaf in ("query", "value", "down")},
    }
    ones = jax.tree.map(
        lambda names: np.ones([axis_size(SOURCE, axis) for axis in names.names], np.float32),
        axes,
        is_leaf=lambda node: isinstance(node, Axes),
    )
    state = optax.ScaleByAdamState(count=jnp.int32(7), mu=ones, nu=ones)
    grow = functools.partial(grow_opt_state, growth, axes=axes, source=SOURCE, moments=mode)
    grown = jax.device_get(jax.jit(grow)(state))
    starts = MomentStarts().after_growth(growth, SOURCE, 7, keeps=mode == "keep")
    correct = functools.partial(starts.correction, decay=0.5, count=jnp.int32(7))
    for leaf, names in by_name(axes).items():
        correction = jax.jit(functools.partial(correct, names))()
        moment = by_name(grown.nu)[leaf]
        starts_now = np.broadcast_to(np.asarray(correction) == 0, moment.shape)
        np.testing.assert_array_equal(moment == 0, starts_now, err_msg=leaf)


def stages(*, first=(), **last):
    return (
        Stage(tokens=640, batch_size=8, **dict(first)),
        Stage(tokens=640, batch_size=8, growth=Stack(2), **last),
        Stage(tokens=640, batch_size=8),
    )


def test_expand_finds_the_moment_starts_of_every_phase():
    run = functools.partial(tiny_run, model=tiny_model(num_layers=6))
    starts = [phase.moment_starts for phase in expand(run(stages=stages()))]
    assert starts == [None, None, None]
    layers = ("layers", (0, 0, 0, 10, 10, 10))
    starts = [
        phase.moment_starts for phase in expand(run(stages=stages(optimizer_state="keep")))
    ]
    assert starts == [
        None,
        MomentStarts(axes=(layers,)),
        MomentStarts(axes=(layers,)),
    ]
    starts = [phase.moment_starts for phase in expand(run(stages=stages(train_layers="new")))]
    released = ("layers", (10, 10, 10, 0, 0, 0))
    assert starts == [None, None, MomentStarts(axes=(released,), embedding=10)]


@pytest.mark.parametrize("optimizer", [ADAMW, MUON], ids=lambda config: config.name)
def test_released_layers_start_with_fresh_moments(optimizer):
    config, trained = SOURCE, (False, True, True)
    tx = optimizer.build(model.logical_axes(config))
    frozen = dataclasses.replace(
        phase_of(config), trained_layers=trained, num_steps=STEPS_BEFORE
    )
    starts = MomentStarts().after_freezing(trained, STEPS_BEFORE, config)
    released = dataclasses.replace(
        frozen, trained_layers=None, moment_starts=starts, optimizer_state="keep", index=1
    )
    params = random_params(config)
    init, update = compiled_optimizer(SOURCE, optimizer)
    state = TrainState(jnp.int32(0), params, state_before(optimizer))
    entered = enter_phase(frozen, released, tx, state, jax.random.key(0))
    late_update = jax.jit(functools.partial(tx.update, moment_starts=starts))
    fresh_state, opt_state = init(params), entered.opt_state
    for seed in range(3):
        grads = random_like(params, 100 + seed)
        found, opt_state = late_update(grads, opt_state, params)
        expected, fresh_state = update(grads, fresh_state, params)
        found, expected = jax.device_get((found, expected))
        for leaf in ("query", "down", "attention_norm"):
            if leaf in found["layers"]:
                np.testing.assert_allclose(
                    found["layers"][leaf][0], expected["layers"][leaf][0], rtol=1e-5, atol=1e-5
                )
        np.testing.assert_allclose(found["embedding"], expected["embedding"], rtol=1e-6)


@pytest.mark.sample(2)
@pytest.mark.parametrize("optimizer", [ADAMW, MUON], ids=lambda config: config.name)
def test_moment_starts_do_not_change_the_layout_of_a_step(optimizer):
    growth = GROWTHS["chain of both"]
    target = growth.target_config(SOURCE)

    def layout(starts):
        tx = optimizer.build(model.logical_axes(target))
        with jax.set_mesh(mesh_of("replica 2, fsdp 2, tensor 2")):
            state = jax.eval_shape(lambda: init_state(target, tx, jax.random.key(0)))
            phase = dataclasses.replace(phase_of(target), moment_starts=starts)
            step = functools.partial(train_step, phase, tx, 0.0)
            after, _ = jax.eval_shape(step, phase.step_inputs, state, random_batch())
        return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, partition_of(leaf)), after)

    assert layout(starts_of(growth)) == layout(None)


OTHER_STATES = [(optax.scale_by_lion(), 1), (optax.scale_by_rms(), 2), (optax.trace(0.9), 1)]


@pytest.mark.parametrize(("tx", "order"), OTHER_STATES)
def test_moments_of_other_optax_states_grow(tx, order):
    growth, axes = GROWTHS["stack"], model.logical_axes(SOURCE)
    params = random_params(SOURCE)
    _, state = jax.jit(lambda: tx.update(params, tx.init(params)))()
    moments = getattr(state, "mu", getattr(state, "nu", getattr(state, "trace", None)))
    grow = functools.partial(grow_opt_state, growth, axes=axes, source=SOURCE)
    grown = jax.jit(grow)((state, optax.EmptyState()))[0]
    grow_moment = functools.partial(growth.grow_moment, axes=axes, source=SOURCE, order=order)
    expected = jax.jit(grow_moment)(moments)
    found = getattr(grown, "mu", getattr(grown, "nu", getattr(grown, "trace", None)))
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_unknown_optimizer_state_is_rejected_by_type():
    params = random_params(SOURCE)
    state = optax.chain(optax.clip(1.0), optax.adafactor(1e-3)).init(params)
    with pytest.raises(UserError, match="FactoredState"):
        grow_opt_state(GROWTHS["stack"], state, model.logical_axes(SOURCE), SOURCE, "grow")


def test_moments_of_other_shapes_are_rejected(monkeypatch):
    monkeypatch.setattr("stackjax.growth.moments._ORDERS", {})
    register_moments(optax.FactoredState, v_row=2, v_col=2, v=2)
    params = jax.eval_shape(lambda: model.init(SOURCE, jax.random.key(0)))
    tx = optax.scale_by_factored_rms(min_dim_size_to_factor=8)
    with pytest.raises(UserError, match=r"parameter of shape \(24, 16\).*optimizer_state"):
        check_moments(jax.eval_shape(tx.init, params), params)
