"""AdamW, Muon, learning-rate schedules and per-parameter rates."""

import dataclasses
import functools
import math

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import (
    GROWTHS,
    MODELS,
    first_microbatch,
    mesh_of,
    random_batch,
    random_params,
    tiny_model,
)
from optimizers import by_name, compiled_optimizer, orthogonalized, random_like

from stackjax import model
from stackjax.config import Rewarm, Schedule
from stackjax.growth import Learn, grow_opt_state
from stackjax.model.config import axis_size
from stackjax.optimizers import AdamW, Muon
from stackjax.sharding.axes import Axes
from stackjax.sharding.partition import on_mesh
from stackjax.training.compile import fit_transformation
from stackjax.training.learning_rate import LearningRate, ParameterRates

AXES = {
    "matrix": Axes(reads=("embed",), writes=("mlp",)),
    "layer gains": Axes(stacked=("layers",), writes=("embed",)),
}
IS_MATRIX = {"matrix": True, "layer gains": False}


def expected_rate(peak, schedule, horizon, tokens):
    """Returns the rate of the documented schedule, written with branches."""
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
    decay = schedule.decay_tokens or 0
    start = schedule.warmup_tokens if schedule.shape == "cosine" else horizon - decay
    return LearningRate(
        shape=schedule.shape,
        peak=3e-4,
        warmup_tokens=float(schedule.warmup_tokens),
        decay_start=float(start),
        decay_tokens=float(horizon - start),
        final_fraction=schedule.final_fraction,
        first_tokens=float(first),
        tokens_per_step=float(per_step),
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
def test_learning_rate_matches_the_documented_formula(
    shape, warmup, plateau, decay, unit, step, first
):
    schedule = Schedule(
        shape=shape,
        warmup_tokens=warmup * unit,
        decay_tokens=decay * unit if shape == "wsd" else None,
    )
    horizon = (warmup + plateau + decay) * unit
    rate = learning_rate(schedule, horizon, first=first * unit, per_step=100 * unit)
    tokens = first * unit + 100 * unit * (step + 1)
    expected = expected_rate(3e-4, schedule, horizon, tokens)
    # Tokens are float32, and subtraction magnifies their rounding.
    assert float(rate(step)) == pytest.approx(expected, rel=1e-4, abs=3e-9)


@pytest.mark.parametrize("shape", ["cosine", "constant", "wsd"])
def test_learning_rate_is_constant_after_the_horizon(shape):
    schedule = Schedule(shape=shape, decay_tokens=300, final_fraction=0.25)
    rate = learning_rate(schedule, 1000)
    last = 3e-4 * (1 if shape == "constant" else 0.25)
    for step in (9, 10, 1000):
        assert float(rate(step)) == pytest.approx(last)


def test_warmup_starts_above_zero_and_ends_at_the_peak():
    rate = learning_rate(Schedule(shape="constant", warmup_tokens=400), 1000)
    rates = [float(rate(step)) / 3e-4 for step in range(5)]
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1, 1])


def test_schedule_over_the_run_continues_across_stages():
    schedule = Schedule(warmup_tokens=200, axis="run")
    whole = learning_rate(schedule, 1000)
    second = dataclasses.replace(whole, first_tokens=400, tokens_per_step=200)
    # The batch doubles: one step of the second stage equals two of the first.
    for step in range(3):
        assert float(second(step)) == pytest.approx(float(whole(4 + 2 * step + 1)))


def random_trees(seed, count):
    rng = np.random.default_rng(seed)
    return [
        {
            "matrix": jax.device_put(np.float32(rng.normal(size=(3, 4)))),
            "layer gains": jax.device_put(np.float32(rng.normal(size=(2, 3)))),
        }
        for _ in range(count)
    ]


@pytest.mark.parametrize("clip_norm", [0.5, 1e3])
def test_steps_match_optax_adamw(clip_norm):
    config = AdamW(peak_learning_rate=0.1, clip_norm=clip_norm)
    ours = config.build(AXES)
    theirs = optax.chain(
        optax.clip_by_global_norm(clip_norm),
        optax.adamw(0.1, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.1, mask=IS_MATRIX),
    )
    params, *gradients = random_trees(0, 6)
    expected, our_state, their_state = params, ours.init(params), theirs.init(params)
    update, expected_update = jax.jit(ours.update), jax.jit(theirs.update)
    for grads in gradients:
        updates, our_state = update(grads, our_state, params)
        params = jax.tree.map(lambda p, u: p - 0.1 * u, params, updates)
        updates, their_state = expected_update(grads, their_state, expected)
        expected = optax.apply_updates(expected, updates)
    for name in params:
        # The rate is multiplied in another order: float32 rounding.
        np.testing.assert_allclose(params[name], expected[name], rtol=1e-5, atol=1e-6)


def test_weight_decay_applies_to_matrices_and_not_to_norms():
    config = AdamW(peak_learning_rate=0.1, weight_decay=0.5)
    tx = config.build(AXES)
    (params,) = random_trees(1, 1)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = jax.jit(tx.update)(zeros, jax.jit(tx.init)(params), params)
    np.testing.assert_array_equal(updates["matrix"], 0.5 * params["matrix"])
    np.testing.assert_array_equal(updates["layer gains"], zeros["layer gains"])


def test_gradients_are_clipped_by_their_global_norm():
    config = AdamW(peak_learning_rate=0.1, clip_norm=1.0, b1=0.0)
    tx = config.build(AXES)
    params, grads = random_trees(2, 2)
    _, state = tx.update(grads, tx.init(params), params)
    norm = math.sqrt(sum(np.sum(np.square(leaf)) for leaf in grads.values()))
    (moments,) = (node for node in state if isinstance(node, optax.ScaleByAdamState))
    for name, grad in grads.items():
        # With b1 = 0 the first moment is the clipped gradient, up to float32 rounding.
        np.testing.assert_allclose(moments.mu[name], grad / np.float32(norm), rtol=1e-5)


ADAMW = AdamW(peak_learning_rate=0.1, weight_decay=0.3, clip_norm=1e3)
MUON = Muon(**vars(ADAMW))

# The matrices of one layer, with input rows and output columns.
LAYER_MATRICES = {
    "query": lambda w_DNH: [w_DNH.reshape(w_DNH.shape[0], -1)],
    "key": lambda w_DKH: [w_DKH.reshape(w_DKH.shape[0], -1)],
    "value": lambda w_DKH: [w_DKH.reshape(w_DKH.shape[0], -1)],
    "out": lambda w_NHD: [w_NHD.reshape(-1, w_NHD.shape[-1])],
    "gate_up": lambda w_DGF: [w_DGF[:, 0], w_DGF[:, 1]],
    "down": lambda w_FD: [w_FD],
}


def gradients_of(config, count):
    """Returns `count` random gradients of a model."""
    return [random_like(random_params(config), seed) for seed in range(count)]


def directions(config, optimizer, gradients):
    """Returns the update of each step at fixed random parameters."""
    init, update = compiled_optimizer(config, optimizer)
    params, found = random_params(config), []
    state = init(params)
    for grads in gradients:
        updates, state = update(grads, state, params)
        found.append(updates)
    return found


def test_muon_orthogonalizes_the_momentum_of_each_matrix_separately():
    config = MODELS["gqa, tied, qk_norm"]
    gradients = gradients_of(config, 3)
    found = directions(config, MUON, gradients)
    params = random_params(config)["layers"]
    for name, matrices in LAYER_MATRICES.items():
        momentum = np.zeros_like(params[name], np.float64)
        for step, (grads, updates) in enumerate(zip(gradients, found, strict=True), 1):
            grad = np.float64(grads["layers"][name])
            momentum = 0.95 * momentum + 0.05 * grad
            # Nesterov: the momentum one step later, with the gradient repeated.
            ahead = 0.95 * momentum / (1 - 0.95 ** (step + 1)) + 0.05 * grad / (1 - 0.95**step)
            # Without bias correction, as in Keller Jordan's code, the direction differs from
            # the second step on.
            uncorrected = 0.95 * momentum + 0.05 * grad
            one, other = (x / np.linalg.norm(x) for x in (ahead, uncorrected))
            assert (np.linalg.norm(one - other) > 0.01) == (step > 1)
            for layer in range(config.num_layers):
                for matrix, weight, update in zip(
                    *(
                        matrices(x[layer])
                        for x in (ahead, params[name], updates["layers"][name])
                    ),
                    strict=True,
                ):
                    size = 0.2 * math.sqrt(max(matrix.shape))
                    expected = size * orthogonalized(matrix) + 0.3 * weight
                    # Five Newton-Schulz steps in float32; each step may triple an error.
                    np.testing.assert_allclose(update, expected, atol=2e-4, err_msg=name)


def test_muon_updates_have_the_rms_of_adamw_updates():
    config = tiny_model(embed_dim=64, mlp_dim=96, num_heads=8, num_kv_heads=4)
    no_decay = dataclasses.replace(MUON, weight_decay=0.0)
    (updates,) = directions(config, no_decay, gradients_of(config, 1))
    for name in LAYER_MATRICES:
        rms = np.sqrt(np.mean(np.square(updates["layers"][name])))
        # Singular values are between about 0.7 and 1.2.
        assert 0.13 < rms < 0.25, name


@pytest.mark.parametrize("name", ["gqa", "gqa, tied, qk_norm"])
def test_muon_updates_embeddings_and_gains_like_adamw(name):
    config, gradients = MODELS[name], gradients_of(MODELS[name], 3)
    for ours, theirs in zip(
        directions(config, MUON, gradients), directions(config, ADAMW, gradients), strict=True
    ):
        for tree, expected in ((ours, theirs), (ours["layers"], theirs["layers"])):
            for leaf in tree.keys() - LAYER_MATRICES.keys() - {"layers"}:
                np.testing.assert_array_equal(tree[leaf], expected[leaf], err_msg=leaf)


def test_muon_decays_matrices_and_not_gains():
    config = MODELS["gqa, tied, qk_norm"]
    params = random_params(config)
    zeros = jax.tree.map(jnp.zeros_like, params)
    (updates,) = directions(config, MUON, [zeros])
    for leaf, update, axes in zip(
        *map(jax.tree.leaves, (params, updates)),
        jax.tree.leaves(model.logical_axes(config), is_leaf=lambda x: isinstance(x, Axes)),
        strict=True,
    ):
        expected = np.float32(0.3) * leaf if axes.reads else np.zeros_like(leaf)
        np.testing.assert_array_equal(update, expected)


def test_muon_clips_gradients_before_momentum():
    config = MODELS["gqa"]
    large, small = gradients_of(config, 2)
    gradients = [jax.tree.map(lambda g: 100 * g, large), small]
    clip = jax.jit(lambda tree: optax.tree.scale(1 / optax.tree.norm(tree), tree))
    clipped = [clip(tree) for tree in gradients]
    once = dataclasses.replace(MUON, clip_norm=1.0)
    ours = directions(config, once, gradients)[-1]
    expected = directions(config, MUON, clipped)[-1]
    for name in LAYER_MATRICES:
        # Five Newton-Schulz steps in float32; each step may triple an error.
        np.testing.assert_allclose(
            ours["layers"][name], expected["layers"][name], atol=2e-4, err_msg=name
        )


def test_muon_on_eight_devices_matches_one_device_and_keeps_the_sharding():
    config, gradients = MODELS["gqa"], gradients_of(MODELS["gqa"], 2)
    expected = directions(config, MUON, gradients)
    mesh = mesh_of("replica 2, fsdp 2, tensor 2")
    tx = MUON.build(model.logical_axes(config))
    with jax.set_mesh(mesh):
        abstract = jax.eval_shape(lambda: model.init(config, jax.random.key(0)))
        layout = jax.tree.map(lambda leaf: leaf.sharding, on_mesh(abstract, mesh))
        params = jax.device_put(random_params(config), layout)
        state, update = tx.init(params), jax.jit(tx.update)
        places = [leaf.sharding for leaf in jax.tree.leaves(state)]
        for grads, there in zip(gradients, expected, strict=True):
            updates, state = update(jax.device_put(grads, layout), state, params)
            for leaf, other, place in zip(
                *map(jax.tree.leaves, (updates, there, layout)), strict=True
            ):
                assert leaf.sharding.is_equivalent_to(place, leaf.ndim)
                # Another summation order; five Newton-Schulz steps may each triple an error.
                np.testing.assert_allclose(leaf, other, atol=2e-4)
        for leaf, place in zip(jax.tree.leaves(state), places, strict=True):
            assert leaf.sharding.is_equivalent_to(place, leaf.ndim)


SOURCE = MODELS["gqa"]
SOURCE_AXES = model.logical_axes(SOURCE)


@functools.cache
def muon_state():
    """Returns the source's Muon state after one step, with nonzero moments."""
    init, update = compiled_optimizer(SOURCE, MUON)
    params = random_params(SOURCE)
    return update(*gradients_of(SOURCE, 1), init(params), params)[1]


def moments_in(state, kind, field):
    """Returns the moments of a state by parameter name."""
    (node,) = (
        node
        for node in jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, kind))
        if isinstance(node, kind)
    )
    leaves, _ = jax.tree_util.tree_flatten_with_path(getattr(node, field))
    return {path[-1].key: leaf for path, leaf in leaves}


MOMENTS = [
    (optax.contrib.MuonState, "mu", 1),
    (optax.ScaleByAdamState, "mu", 1),
    (optax.ScaleByAdamState, "nu", 2),
]
# One growth per rule of moment growth.
GROWN = [
    "layer map",
    "depth zero",
    "split, uneven",
    "split, odd ratios",
    "width zero",
    "width random",
    "noise",
    "chain of both",
]


@pytest.mark.sample(4)
@pytest.mark.parametrize("mode", ["grow", "keep"])
@pytest.mark.parametrize("name", GROWN)
def test_grown_muon_state_has_the_target_structure_and_grown_moments(name, mode):
    growth, target = GROWTHS[name], GROWTHS[name].target_config(SOURCE)
    grow = functools.partial(
        grow_opt_state, growth, axes=SOURCE_AXES, source=SOURCE, moments=mode
    )
    grown = jax.device_get(jax.jit(grow)(muon_state()))
    tx = MUON.build(model.logical_axes(target))
    fresh = jax.eval_shape(lambda: tx.init(model.init(target, jax.random.key(0))))
    assert jax.tree.structure(grown) == jax.tree.structure(fresh)
    assert [(x.shape, x.dtype) for x in jax.tree.leaves(grown)] == [
        (x.shape, x.dtype) for x in jax.tree.leaves(fresh)
    ]
    axes, maps = by_name(SOURCE_AXES), growth.axis_maps(SOURCE)
    for kind, field, order in MOMENTS:
        before, after = (moments_in(state, kind, field) for state in (muon_state(), grown))
        assert before.keys() == after.keys()
        assert (kind is optax.contrib.MuonState) == (before.keys() == LAYER_MATRICES.keys())
        whole = {
            leaf: before.get(leaf, np.zeros(shape, np.float32))
            for leaf, shape in SHAPES.items()
        }
        grow_moment = functools.partial(growth.grow_moment, axes=axes, source=SOURCE)
        by_growth = jax.jit(
            functools.partial(grow_moment, order=order if mode == "grow" else 0)
        )(whole)
        for leaf, moment in after.items():
            expected = np.array(by_growth[leaf])
            if mode == "keep":
                for place, axis in enumerate(axes[leaf].names):
                    if axis in maps:
                        np.moveaxis(expected, place, 0)[maps[axis].is_new] = 0
            np.testing.assert_array_equal(moment, expected, err_msg=leaf)


SHAPES = {leaf: np.shape(value) for leaf, value in by_name(random_params(SOURCE)).items()}


NARROW = {
    optimizer: dataclasses.replace(optimizer, moments_dtype="bfloat16")
    for optimizer in (ADAMW, MUON)
}
both = pytest.mark.parametrize("optimizer", NARROW, ids=lambda config: config.name)


def cast_moments(state, dtype):
    """Returns the state with its moments cast to `dtype`."""

    def cast(path, leaf):
        is_moment = any(getattr(key, "name", None) in ("mu", "nu") for key in path)
        return leaf.astype(dtype) if is_moment else leaf

    return jax.tree_util.tree_map_with_path(cast, state)


def shapes_and_types(tree):
    return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)


def abstract_state(config, optimizer):
    tx = optimizer.build(model.logical_axes(config))
    return jax.eval_shape(lambda: tx.init(model.init(config, jax.random.key(0))))


@both
def test_only_moments_are_stored_in_bfloat16(optimizer):
    wide, narrow = (abstract_state(SOURCE, o) for o in (optimizer, NARROW[optimizer]))
    expected = jax.eval_shape(lambda state: cast_moments(state, jnp.bfloat16), wide)
    assert shapes_and_types(narrow) == shapes_and_types(expected)
    assert shapes_and_types(narrow) != shapes_and_types(wide)


@both
def test_steps_with_bfloat16_moments_compute_in_float32(optimizer):
    init, update = compiled_optimizer(SOURCE, NARROW[optimizer])
    _, wide_update = compiled_optimizer(SOURCE, optimizer)
    params = random_params(SOURCE)
    state = init(params)
    for grads in gradients_of(SOURCE, 3):
        expected, wide = wide_update(grads, cast_moments(state, jnp.float32), params)
        updates, state = update(grads, state, params)
        # Separate compilation may round differently: five steps may each triple an error.
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, atol=2e-4), updates, expected
        )
        for leaf, moment in zip(*map(jax.tree.leaves, (state, wide)), strict=True):
            # Half of the last of 8 bits, plus the rounding of separate compilation.
            np.testing.assert_allclose(
                np.float32(leaf), np.float32(moment), rtol=1.01 * 2**-8, atol=1e-9
            )


@functools.cache
def compiled_gradient():
    """Returns the compiled function (params, batch) -> (mean loss, gradient)."""

    def loss(params, batch):
        sums = model.next_token_loss(SOURCE, params, first_microbatch(batch))
        return sums.objective / jnp.sum(batch.loss_weights)

    return jax.jit(jax.value_and_grad(loss))


@both
def test_bfloat16_moments_train_like_float32_moments(optimizer):
    losses = []
    for config in (optimizer, NARROW[optimizer]):
        init, update = compiled_optimizer(SOURCE, config)
        params, found = random_params(SOURCE), []
        state = init(params)
        for _ in range(25):
            loss, grads = compiled_gradient()(params, random_batch())
            updates, state = update(grads, state, params)
            params = jax.tree.map(lambda p, u: p - np.float32(1e-2) * u, params, updates)
            found.append(float(loss))
        losses.append(found)
    wide, narrow = np.array(losses)
    assert wide[-1] < wide[0] - 1
    # Bfloat16 rounds moments by less than 0.4%, at random. A frozen moment would cost a
    # tenth or more.
    np.testing.assert_allclose(narrow, wide, atol=4e-3)


@pytest.mark.sample(3)
@pytest.mark.parametrize("name", GROWN)
def test_grown_bfloat16_moments_have_the_target_structure(name):
    growth, narrow = GROWTHS[name], NARROW[MUON]
    fresh = abstract_state(growth.target_config(SOURCE), narrow)
    for mode in ("grow", "keep"):
        grow = functools.partial(grow_opt_state, growth, source=SOURCE, moments=mode)
        grown = jax.eval_shape(
            functools.partial(grow, axes=SOURCE_AXES), abstract_state(SOURCE, narrow)
        )
        assert shapes_and_types(grown) == shapes_and_types(fresh)


def test_bfloat16_moments_grow_in_float32_and_are_rounded_once():
    narrow = cast_moments(muon_state(), jnp.bfloat16)
    wide = cast_moments(narrow, jnp.float32)
    grow = jax.jit(
        lambda state: grow_opt_state(
            GROWTHS["split, odd ratios"], state, SOURCE_AXES, SOURCE, "grow"
        )
    )
    expected = cast_moments(grow(wide), jnp.bfloat16)
    jax.tree.map(np.testing.assert_array_equal, grow(narrow), expected)


def test_fit_stores_moments_in_bfloat16():
    params = {"maps": {"embed": jnp.ones((2, 3))}, "source": random_params(SOURCE)}
    state = jax.eval_shape(fit_transformation(NARROW[ADAMW]).init, params)
    dtypes = [leaf.dtype.name for leaf in jax.tree.leaves(state)]
    assert sorted(dtypes) == ["bfloat16", "bfloat16", "int32"]


def rates_of(growth, *, source=SOURCE, rewarm=None, fan_in=False, trained=None):
    return ParameterRates(
        source=source,
        growth=growth,
        rewarm=rewarm,
        scale_by_fan_in=fan_in,
        trained_layers=trained,
    )


def factors_by_name(rates, tokens=0):
    """Returns the rate factor of every entry, by parameter name."""
    [factors] = factors_at(rates, [tokens])
    return factors


def factors_at(rates, all_tokens):
    """Yields the rate factor of every entry, by parameter name, at each token count."""
    target = rates.source if rates.growth is None else rates.growth.target_config(rates.source)
    axes = model.logical_axes(target)
    function = jax.jit(functools.partial(rates, axes))
    for tokens in all_tokens:
        factors = by_name(jax.device_get(function(jnp.float32(tokens))))
        yield {
            leaf: np.broadcast_to(
                factors[leaf], [axis_size(target, axis) for axis in names.names]
            )
            for leaf, names in by_name(axes).items()
        }


def expected_rewarm_factors(growth, source, new_rate):
    """Returns `new_rate` for new entries and 1 for old entries, by parameter name."""
    target, maps = growth.target_config(source), growth.axis_maps(source)
    found = {}
    for leaf, names in by_name(model.logical_axes(source)).items():
        rate = np.full([axis_size(target, axis) for axis in names.names], new_rate)
        # The first copy of each entry is old.
        firsts = [
            [maps[axis].sources.index(i) for i in range(axis_size(source, axis))]
            if axis in maps
            else range(axis_size(source, axis))
            for axis in names.names
        ]
        rate[np.ix_(*firsts)] = 1
        found[leaf] = rate
    return found


@pytest.mark.sample(6)
@pytest.mark.parametrize("name", GROWTHS)
def test_rewarm_scales_new_parameters_and_keeps_old_rates(name):
    rates = rates_of(GROWTHS[name], rewarm=Rewarm(tokens=256, ratio=1.3))
    counts = (1, 64, 256, 10**12)
    for tokens, found in zip(counts, factors_at(rates, counts), strict=True):
        expected = expected_rewarm_factors(GROWTHS[name], SOURCE, 1.3 * min(1, tokens / 256))
        for leaf, rate in expected.items():
            np.testing.assert_allclose(found[leaf], rate, rtol=1e-6, err_msg=leaf)


def test_rewarm_tokens_may_exceed_int32():
    rates = rates_of(GROWTHS["stack"], rewarm=Rewarm(tokens=6_000_000_000, ratio=1.0))
    query = factors_by_name(rates, 1_500_000_000)["query"]
    assert query[:3] == pytest.approx(1)
    assert query[3:] == pytest.approx(0.25)


# Fan-in ratio of each matrix: channels grow by 3/2, units by 6/5 and query heads by 3.
FAN_IN = {
    "query": 1.5,
    "key": 1.5,
    "value": 1.5,
    "out": 3,
    "gate_up": 1.5,
    "down": 1.2,
    "head": 1.5,
}


def test_matrix_rates_are_divided_by_the_fan_in_ratio():
    found = factors_by_name(rates_of(GROWTHS["split, odd ratios"], fan_in=True))
    for leaf, rate in found.items():
        assert rate == pytest.approx(1 / FAN_IN.get(leaf, 1)), leaf
    tied = rates_of(
        GROWTHS["split, odd ratios"], source=MODELS["mqa, tied, slowed"], fan_in=True
    )
    assert factors_by_name(tied)["embedding"] == pytest.approx(1)


def test_depth_growth_keeps_every_fan_in():
    for rate in factors_by_name(rates_of(GROWTHS["stack"], fan_in=True)).values():
        assert (rate == 1).all()


@pytest.mark.parametrize("name", ["gqa", "gqa, tied, qk_norm"])
@pytest.mark.parametrize("trained", [(True, False, True), (False, False, True)])
def test_frozen_layers_and_embedding_have_rate_zero(name, trained):
    source = MODELS[name]
    found = factors_by_name(rates_of(None, source=source, trained=trained))
    layers = model.logical_axes(source)["layers"].keys()
    outer = {"embedding": float(source.tie_head), "final_norm": 1.0, "head": 1.0}
    for leaf, rate in found.items():
        expected = np.float32(trained) if leaf in layers else np.float32([outer[leaf]])
        for i, of_layer in enumerate(expected):
            assert (rate[i] == of_layer).all() if leaf in layers else (rate == of_layer).all()


@hypothesis.settings(max_examples=15, deadline=None)
@hypothesis.given(
    name=st.sampled_from(["chain of both", "split, odd ratios", "learn both"]),
    tokens=st.integers(1, 1000),
    rewarm=st.none()
    | st.builds(
        Rewarm,
        tokens=st.integers(1, 500),
        ratio=st.floats(0, 4, width=32, allow_subnormal=False),
    ),
    fan_in=st.booleans(),
    data=st.data(),
)
def test_rate_factors_multiply(name, tokens, rewarm, fan_in, data):
    growth = GROWTHS[name]
    depth = growth.target_config(SOURCE).num_layers
    layers = st.lists(st.booleans(), min_size=depth, max_size=depth).map(tuple)
    trained = data.draw(st.none() | layers)
    each = {"rewarm": rewarm, "fan_in": fan_in, "trained": trained}
    kinds = [each, *({field: value} for field, value in each.items())]
    axes = model.logical_axes(growth.target_config(SOURCE))

    @jax.jit
    def factors(tokens):
        return [rates_of(growth, **kind)(axes, tokens) for kind in kinds]

    found = jax.device_get(factors(jnp.float32(tokens)))
    together, *alone = [by_name(of_kind) for of_kind in found]
    for leaf, rate in together.items():
        product = alone[0][leaf] * alone[1][leaf] * alone[2][leaf]
        np.testing.assert_allclose(rate, product, rtol=1e-5, atol=1e-7, err_msg=leaf)


def test_fit_updates_maps_with_adam_and_keeps_the_source():
    config = AdamW(peak_learning_rate=0.1, weight_decay=0.5, clip_norm=0.5)
    growth = Learn(2, embed=2)
    init_maps = functools.partial(growth.init_maps, SOURCE_AXES, SOURCE)
    maps = jax.jit(init_maps)(key=jax.random.key(0))
    params = {"maps": maps, "source": random_params(SOURCE)}
    tx = fit_transformation(config)
    adam = optax.chain(optax.clip_by_global_norm(0.5), optax.scale_by_adam(0.9, 0.95, 1e-8))
    state, expected_state = jax.jit(tx.init)(params), jax.jit(adam.init)(maps)
    # Two moments of the maps and one count. The source has no moments.
    assert optax.tree.size(state) == 2 * optax.tree.size(maps) + 1
    for seed in range(2):
        # The source's gradient does not count toward the norm.
        grads = random_like(params, seed)
        updates, state = tx.update(grads, state, params)
        expected, expected_state = adam.update(grads["maps"], expected_state, maps)
        jax.tree.map(np.testing.assert_array_equal, updates["maps"], expected)
        for leaf in jax.tree.leaves(updates["source"]):
            assert not np.any(leaf)
