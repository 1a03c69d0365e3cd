"""Laws of every growth operator, tested over one table of operators."""

import dataclasses
import functools
from fractions import Fraction

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import (
    COPIES,
    GROWTHS,
    KINDS,
    MODELS,
    mesh_of,
    phase_of,
    random_batch,
    random_params,
    tiny_model,
)

from stackjax import model
from stackjax.growth import (
    DepthRandom,
    DepthUpscale,
    DepthZero,
    InsertBlock,
    Interleave,
    LayerMap,
    Learn,
    Noise,
    Shrink,
    Stack,
    WidthRandom,
    WidthSplit,
    WidthZero,
    chain,
    parse_growth,
)
from stackjax.growth.axis_map import NEW, is_new
from stackjax.optimizers import AdamW
from stackjax.runtime.errors import UserError
from stackjax.sharding.axes import Axes
from stackjax.sharding.partition import on_mesh
from stackjax.training.compile import fit_transformation
from stackjax.training.train_state import (
    TrainState,
    fit_state,
    grow_state,
    init_state,
    train_step,
)

SOURCE = tiny_model()
KEY = jax.random.key(0)
# Without weight decay, only parameters with a gradient change.
OPTIMIZER = AdamW(peak_learning_rate=1e-2, weight_decay=0.0)
# Operators with growable moments. Learned growth mixes parameters.
LINEAR = [name for name in GROWTHS if not name.startswith("learn")]


@pytest.fixture(params=COPIES)
def copies(request):
    """A layer-copying growth and the source layer of each target layer."""
    return COPIES[request.param]


def grow_params(growth, params, config, fresh=random_params):
    axes = model.logical_axes(config)
    grow = functools.partial(growth.grow_params, axes=axes, source=config, fresh=fresh)
    # One compiled program is faster than separate operations.
    return jax.jit(grow)(params, key=KEY)


def grow_moment(growth, moment, config, order):
    axes = model.logical_axes(config)
    grow = functools.partial(growth.grow_moment, axes=axes, source=config, order=order)
    return jax.device_get(jax.jit(grow)(moment))


def new_entries(growth, config):
    """Masks of new entries that broadcast against the grown parameters."""
    axes, maps = model.logical_axes(config), growth.axis_maps(config)
    masks = jax.jit(lambda: jax.tree.map(lambda names: is_new(names, maps), axes))
    return jax.device_get(masks())


def optimizer_of(config):
    return OPTIMIZER.build(model.logical_axes(config))


def shapes(tree):
    return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)


def assert_same_tree(tree, other):
    assert shapes(tree) == shapes(other)
    jax.tree.map(np.testing.assert_array_equal, tree, other)


def grown_phase(growth, source=SOURCE, **fields):
    """Returns a phase that trains the grown model, with masks if the growth has any."""
    return phase_of(
        growth.target_config(source),
        source=source,
        growth=growth,
        reparameterizations=growth.reparameterizations(source),
        **fields,
    )


# Law 1: shapes, dtypes, axes.


@pytest.mark.sample(9)
@pytest.mark.parametrize("source", MODELS)
@pytest.mark.parametrize("name", GROWTHS)
def test_grown_parameters_have_the_target_shapes_and_axes(name, source):
    growth, source = GROWTHS[name], MODELS[source]
    target = growth.target_config(source)
    fresh = functools.partial(model.init, key=KEY)
    grown = jax.eval_shape(
        lambda p: grow_params(growth, p, source, fresh), random_params(source)
    )
    assert shapes(grown) == shapes(jax.eval_shape(lambda: model.init(target, KEY)))
    assert model.logical_axes(target) == model.logical_axes(source)
    assert growth.source_config(target) == source


@pytest.mark.sample(3)
@pytest.mark.parametrize("name", LINEAR)  # fitted maps and their products are float32
def test_grown_parameters_keep_the_source_dtype(name):
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), random_params(SOURCE))
    fresh = lambda config: jax.tree.map(  # noqa: E731
        lambda leaf: leaf.astype(jnp.bfloat16), model.init(config, KEY)
    )
    grown = jax.eval_shape(lambda p: grow_params(GROWTHS[name], p, SOURCE, fresh), half)
    assert {leaf.dtype for leaf in jax.tree.leaves(grown)} == {jnp.dtype(jnp.bfloat16)}


def test_copied_layers_equal_their_source_and_other_parameters_are_unchanged(copies):
    growth, sources = copies
    assert growth.target_config(SOURCE) == dataclasses.replace(SOURCE, num_layers=len(sources))
    params = random_params(SOURCE)
    grown = grow_params(growth, params, SOURCE, fresh=None)
    for name, leaf in params["layers"].items():
        np.testing.assert_array_equal(grown["layers"][name], np.take(leaf, sources, axis=0))
    for name in params.keys() - {"layers"}:
        np.testing.assert_array_equal(grown[name], params[name])
    assert growth.preserves_function == "never"


@hypothesis.settings(max_examples=30, deadline=None)
@hypothesis.given(st.integers(1, 4), st.lists(st.integers(0, 3), min_size=1, max_size=9))
def test_layer_map_is_a_gather(extra, layers):
    depth = max(layers) + extra
    tree = {"w": np.arange(depth * 2.0).reshape(depth, 2, 1)}
    axes = {"w": Axes(("layers",), ("embed",), ("mlp",))}
    config = dataclasses.replace(SOURCE, num_layers=depth)
    growth = LayerMap(tuple(layers))
    grown = growth.grow_params(tree, axes, config, key=KEY, fresh=None)
    np.testing.assert_array_equal(grown["w"], tree["w"][layers])


# Law 2: composition.

TREE_AXES = {"table": Axes(reads=("vocab",)), "w": Axes(("layers",), ("embed",), ("mlp",))}


def grow_tree(growth, depth):
    """Grows a small tree of `depth` layers."""
    tree = {"table": np.arange(3), "w": np.arange(depth * 2.0).reshape(depth, 2, 1)}
    config = dataclasses.replace(SOURCE, num_layers=depth)
    return growth.grow_params(tree, TREE_AXES, config, key=KEY, fresh=None)


@pytest.mark.parametrize(("first", "second"), [(2, 3), (3, 2), (1, 4), (4, 1)])
@pytest.mark.parametrize("depth", [1, 3])
def test_stacking_twice_equals_stacking_once_by_the_product(first, second, depth):
    twice = chain(Stack(first), Stack(second))
    assert_same_tree(grow_tree(twice, depth), grow_tree(Stack(first * second), depth))


FACTORS = st.integers(1, 3)
OPERATORS = (
    st.builds(Stack, FACTORS)
    | st.builds(Interleave, FACTORS)
    | st.builds(DepthZero, FACTORS, st.sampled_from(["interleave", "stack"]))
    | st.builds(WidthSplit, FACTORS, FACTORS, FACTORS)
    | st.builds(WidthZero, FACTORS, FACTORS, FACTORS)
)


@hypothesis.settings(max_examples=30, deadline=None)
@hypothesis.given(OPERATORS, OPERATORS, OPERATORS)
def test_chains_are_associative_and_recover_the_source_config(a, b, c):
    assert chain(a, chain(b, c)) == chain(chain(a, b), c) == chain(a, b, c)
    whole = chain(a, b, c)
    assert whole.source_config(whole.target_config(SOURCE)) == SOURCE
    step_by_step = c.target_config(b.target_config(a.target_config(SOURCE)))
    assert whole.target_config(SOURCE) == step_by_step


def test_chain_applies_growths_in_order():
    table = [
        (chain(Stack(2), LayerMap((0, 3, 2))), [0, 1, 0]),
        (chain(LayerMap((1, 0)), Stack(2)), [1, 0, 1, 0]),
        (chain(LayerMap((1, 0)), Interleave(2)), [1, 1, 0, 0]),
    ]
    for growth, layers in table:
        np.testing.assert_array_equal(grow_tree(growth, 2)["w"][:, 0, 0] / 2, layers)


# Law 3: optimizer state and gradients of new entries.


@functools.cache
def trained_source() -> TrainState:
    """Returns the source after one step, with nonzero moments."""
    tx, params = optimizer_of(SOURCE), random_params(SOURCE)
    state = TrainState(jnp.int32(0), params, jax.jit(tx.init)(params))
    phase = phase_of(SOURCE)
    step = jax.jit(functools.partial(train_step, phase, tx, 0.0, phase.step_inputs))
    return step(state, random_batch())[0]


def grow_jitted(growth, tx, state, mode):
    return jax.jit(functools.partial(grow_state, growth, SOURCE, tx, optimizer_state=mode))(
        state, key=KEY
    )


def moments(state) -> optax.ScaleByAdamState:
    (found,) = (node for node in state.opt_state if isinstance(node, optax.ScaleByAdamState))
    return found


@pytest.mark.sample(3)
@pytest.mark.parametrize("mode", ["grow", "keep"])
@pytest.mark.parametrize("name", LINEAR)
def test_grown_optimizer_state_has_the_target_structure(name, mode):
    growth, state = GROWTHS[name], trained_source()
    target = growth.target_config(SOURCE)
    tx = optimizer_of(target)
    grow = functools.partial(grow_state, growth, SOURCE, tx, optimizer_state=mode)
    grown = jax.eval_shape(grow, state, key=KEY)
    expected = jax.eval_shape(lambda: init_state(target, tx, KEY))
    assert jax.tree.structure(grown) == jax.tree.structure(expected)
    assert shapes(grown) == shapes(expected)


def test_learned_growth_rejects_grown_moments():
    with pytest.raises(ValueError, match="use optimizer_state 'reset'"):
        GROWTHS["learn both"].grow_moment({}, {}, SOURCE, order=1)


def test_moments_of_copied_layers_equal_their_source(copies):
    growth, sources = copies
    state = trained_source()
    grown = grow_jitted(growth, optimizer_of(SOURCE), state, "grow")
    assert (int(grown.step), int(moments(grown).count)) == (0, 1)
    for kind in ("mu", "nu"):
        before, after = getattr(moments(state), kind), getattr(moments(grown), kind)
        for name, leaf in before["layers"].items():
            expected = np.take(np.asarray(leaf), sources, axis=0)
            np.testing.assert_array_equal(after["layers"][name], expected)
        np.testing.assert_array_equal(after["embedding"], before["embedding"])


@pytest.mark.sample(6)
@pytest.mark.parametrize("name", LINEAR)
def test_kept_moments_equal_the_sources_and_new_moments_are_zero(name):
    growth, state = GROWTHS[name], trained_source()
    tx = optimizer_of(growth.target_config(SOURCE))
    grown = jax.device_get(moments(grow_jitted(growth, tx, state, "keep")))
    kept_from = jax.device_get(moments(state))
    maps, axes = growth.axis_maps(SOURCE), model.logical_axes(SOURCE)
    news = new_entries(growth, SOURCE)
    for kind in ("mu", "nu"):

        def check(after, before, names, new):
            assert not after[np.broadcast_to(new, after.shape)].any()
            # The first copy of each entry keeps its moment.
            for axis, axis_name in enumerate(names.names):
                if axis_name in maps:
                    sources = maps[axis_name].sources
                    kept = sorted(set(sources) - {NEW})
                    after = np.take(after, [sources.index(i) for i in kept], axis=axis)
                    before = np.take(before, kept, axis=axis)
            np.testing.assert_array_equal(after, before)

        jax.tree.map(check, getattr(grown, kind), getattr(kept_from, kind), axes, news)
    assert int(grown.count) == 1


@pytest.mark.sample(2)
@pytest.mark.parametrize("name", ["stack", "split", "width zero", "learn both"])
def test_reset_optimizer_state_is_zero(name):
    growth = GROWTHS[name]
    state = dataclasses.replace(trained_source(), opt_state=None)
    tx = optimizer_of(growth.target_config(SOURCE))
    grown = grow_jitted(growth, tx, state, "reset")
    assert int(moments(grown).count) == 0
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(moments(grown).nu))


def test_stage_without_growth_keeps_parameters_and_moments():
    state = trained_source()
    kept = grow_state(None, SOURCE, optimizer_of(SOURCE), state, KEY, "keep")
    assert int(kept.step) == 0
    assert_same_tree(
        (kept.params, moments(kept).mu, moments(kept).count),
        (state.params, moments(state).mu, moments(state).count),
    )


def gradient_of(phase):
    """Returns the compiled loss gradient with respect to the trained parameters."""

    def loss(params, step, batch):
        run = phase.model_params(params, phase.tokens(step))
        sums = model.next_token_loss(phase.model, run, jax.tree.map(lambda x: x[0], batch))
        return sums.objective / jnp.sum(batch.loss_weights)

    return jax.jit(jax.grad(loss))


@pytest.mark.sample(7)
@pytest.mark.parametrize(
    "name",
    [
        "stack",
        "depth zero",
        "depth zero, stacked, fresh",
        "depth random",
        "split",
        "split, odd ratios",
        "split, next layer",
        "width zero",
        "width zero, channels alone",
        "width zero, queries alone",
        "width random",
        "chain of both",
        "chain of masks",
    ],
)
def test_every_unit_gets_a_gradient_within_two_updates(name):
    growth = GROWTHS[name]
    phase = grown_phase(growth)
    tx, axes = optimizer_of(phase.model), model.logical_axes(phase.model)
    gradient = gradient_of(phase)

    @jax.jit
    def update(params, opt_state, step, batch):
        grads = gradient(params, step, batch)
        updates, opt_state = tx.update(grads, opt_state, params)
        return jax.tree.map(lambda p, u: p - 1e-2 * u, params, updates), opt_state, grads

    params = grow_params(growth, random_params(SOURCE), SOURCE)
    opt_state = jax.jit(tx.init)(params)
    seen = jax.tree.map(np.zeros_like, params)
    # Masks open one after another, over two steps each. All are open by step 20.
    for step in range(20, 23):
        params, opt_state, grads = update(params, opt_state, step, random_batch(step))
        seen = jax.tree.map(lambda total, grad: total + np.abs(grad), seen, grads)

    def check(total, names):
        for axis, axis_name in enumerate(names.names):
            if axis_name != "vocab":
                others = tuple(i for i in range(total.ndim) if i != axis)
                assert (total.sum(axis=others) > 0).all(), (names, axis_name)

    jax.tree.map(check, seen, axes)


# Law 4: sharding.


@pytest.mark.sample(12)
@pytest.mark.parametrize("name", GROWTHS)
def test_growth_on_eight_devices_matches_one_device_and_keeps_the_sharding(name):
    growth = GROWTHS[name]
    target, mode = growth.target_config(SOURCE), "grow" if name in LINEAR else "reset"
    tx = optimizer_of(target)
    grow = functools.partial(grow_state, growth, SOURCE, tx, optimizer_state=mode)
    on_one = jax.jit(grow)(trained_source(), key=KEY)
    mesh = mesh_of("replica 2, fsdp 2, tensor 2")
    with jax.set_mesh(mesh):
        source = jax.eval_shape(lambda: init_state(SOURCE, tx, KEY))
        layout = jax.tree.map(lambda leaf: leaf.sharding, on_mesh(source, mesh))
        grown = jax.jit(grow)(jax.device_put(trained_source(), layout), key=KEY)
        expected = on_mesh(jax.eval_shape(lambda: init_state(target, tx, KEY)), mesh)
        for leaf, abstract in zip(
            jax.tree.leaves(grown), jax.tree.leaves(expected), strict=True
        ):
            assert leaf.sharding.is_equivalent_to(abstract.sharding, leaf.ndim)
    assert not grown.params["layers"]["down"].sharding.is_fully_replicated
    same = np.testing.assert_array_equal
    if name not in COPIES:  # the compiler may round normal draws and sums differently
        same = functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6)
    jax.tree.map(same, jax.device_get(grown), jax.device_get(on_one))


# Law 6: moments scale like gradients. Law 5, the function, is in
# test_function_preserving.py.

MULTIPLES = {
    "depth zero": GROWTHS["depth zero"],
    "split": GROWTHS["split"],
    "split, odd ratios": GROWTHS["split, odd ratios"],
    "width zero": GROWTHS["width zero"],
    "width zero, channels alone": GROWTHS["width zero, channels alone"],
    "uneven units and heads": WidthSplit(mlp=2, heads=2, split="uneven"),
    "each query its key": WidthSplit(embed=2, kv_heads=1, heads=2),
    "width random": WidthRandom(embed=2, mlp=2, mask_tokens=128),
    "depth random": GROWTHS["depth random"],
}


SOURCES = MODELS | KINDS


@functools.cache
def source_gradient(source):
    config = SOURCES[source]
    return jax.device_get(
        gradient_of(phase_of(config))(random_params(config), 0, random_batch())
    )


@pytest.mark.sample(7)
@pytest.mark.parametrize(
    ("name", "source"),
    [
        (name, source)
        for source in (
            "gqa",
            "mqa, tied, slowed",
            "like gemma",
            "like olmo",
            "like gpt-neox",
            "like gpt-2",
            "biases and RMSNorm",
        )
        for name in MULTIPLES
        # New heads would change a norm over all heads, and with uneven shares its gradient
        # mixes them.
        if source != "like olmo" or name not in ("width zero", "uneven units and heads")
        # New channels would change the mean in LayerNorm.
        if "gpt" not in source or not name.startswith(("width zero", "width random"))
        if "gpt" not in source or "odd" not in name
    ],
)
def test_moments_scale_by_the_gradient_factor_and_its_square(name, source):
    growth, config = MULTIPLES[name], SOURCES[source]
    assert growth.preserves_function != "never"
    params = grow_params(growth, random_params(config), config)
    found = gradient_of(grown_phase(growth, config))(params, 0, random_batch())
    expected = grow_moment(growth, source_gradient(source), config, order=1)
    squares = jax.tree.map(np.square, source_gradient(source))
    grown_squares = grow_moment(growth, squares, config, order=2)
    only_copies = isinstance(growth, WidthSplit)

    def check(gradient, moment, square, new):
        old = ~np.broadcast_to(new, gradient.shape)
        known = old | only_copies  # gradients of new entries are unknown
        scale = np.abs(gradient).max()
        # Without rotation, the bias of keys has no gradient: only roundings.
        bound = max(2e-5 * scale, 1e-7)
        np.testing.assert_allclose(gradient[known], moment[known], rtol=1e-3, atol=bound)
        np.testing.assert_allclose(square, np.square(moment), rtol=1e-5, atol=1e-12)
        assert only_copies or not moment[~old].any()

    news = new_entries(growth, config)
    jax.tree.map(check, jax.device_get(found), expected, grown_squares, news)


@pytest.mark.sample(3)
@pytest.mark.parametrize(
    "name", ["split", "split, uneven", "split, noise", "split, odd ratios", "depth zero"]
)
def test_gradients_and_grown_moments_sum_to_the_source_gradient(name):
    """A copy's grown moment is the mean share of the source's moment."""
    growth = GROWTHS[name]
    grow = functools.partial(grow_params, growth, config=SOURCE)
    params = grow(random_params(SOURCE))
    pull_back = jax.jit(lambda grown: jax.vjp(grow, random_params(SOURCE))[1](grown))
    moment = grow_moment(growth, source_gradient("gqa"), SOURCE, order=1)
    gradient = gradient_of(grown_phase(growth))(params, 0, random_batch())
    for grown in (moment, gradient):
        (back,) = jax.device_get(pull_back(grown))
        for leaf, expected in zip(
            jax.tree.leaves(back), jax.tree.leaves(source_gradient("gqa")), strict=True
        ):
            np.testing.assert_allclose(leaf, expected, rtol=1e-3, atol=2e-5)


# The output of each operator.


@pytest.mark.parametrize("order", ["interleave", "stack"])
def test_new_depth_zero_layers_copy_all_but_zero_output_matrices(order):
    params = random_params(SOURCE)
    grown = jax.device_get(grow_params(DepthZero(2, order=order), params, SOURCE))["layers"]
    old, new = {"interleave": ([0, 2, 4], [1, 3, 5]), "stack": ([0, 1, 2], [3, 4, 5])}[order]
    for name, leaf in params["layers"].items():
        np.testing.assert_array_equal(grown[name][old], leaf)
        copied = np.zeros_like(leaf) if name in ("out", "down") else leaf
        np.testing.assert_array_equal(grown[name][new], copied)


def test_next_layer_units_copy_the_layer_above_or_their_own_if_last():
    growth = WidthSplit(mlp=2, new_units="next_layer")
    assert growth.preserves_function == "never"
    params = random_params(SOURCE)
    grown = grow_params(growth, params, SOURCE)["layers"]
    gate_up, down = params["layers"]["gate_up"], params["layers"]["down"]
    np.testing.assert_array_equal(grown["gate_up"][..., :20], gate_up)
    np.testing.assert_array_equal(grown["gate_up"][..., 20:], gate_up[[1, 2, 2]])
    np.testing.assert_array_equal(grown["down"], np.concatenate([down, down], axis=1) / 2)


def test_split_noise_sums_to_zero_over_copies_and_has_the_given_size():
    source = tiny_model(mlp_dim=400)
    params = random_params(source)
    plain = grow_params(WidthSplit(mlp=3), params, source)["layers"]["down"]
    noisy = grow_params(WidthSplit(mlp=3, noise=0.3), params, source)["layers"]["down"]
    noise = np.asarray(noisy - plain).reshape(3, 3, 400, 16)
    np.testing.assert_allclose(noise.sum(axis=1), 0, atol=1e-6)
    # Subtracting the mean of three copies leaves two thirds of the variance.
    stddev = 0.3 * params["layers"]["down"].std() * np.sqrt(2 / 3)
    assert noise.std() == pytest.approx(stddev, rel=0.02)


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    ("alpha", "norms"), [(0.0, "before"), (0.2, "before"), (1.0, "before"), (0.2, "both")]
)
def test_noise_mixes_matrices_with_the_papers_distribution(alpha, norms):
    source = tiny_model(embed_dim=64, mlp_dim=96, norm_placement=norms)
    params = random_params(source)
    grown = jax.device_get(grow_params(Noise(alpha), params, source))
    rest = jax.tree.map(lambda new, old: new - (1 - alpha) * old, grown, params)
    for name, leaf in rest["layers"].items():
        if name.endswith("norm"):
            np.testing.assert_array_equal(grown["layers"][name], params["layers"][name])
            continue
        variance = 1 / (64 * 3**2) if name in ("out", "down") else 2 / (5 * 64)
        assert leaf.std() == pytest.approx(alpha * np.sqrt(variance), rel=0.05, abs=1e-6)
    assert rest["head"].std() == pytest.approx(
        alpha * np.sqrt(2 / (5 * 64)), rel=0.05, abs=1e-6
    )


def test_shrink_multiplies_matrices_and_divides_their_moments():
    growth, params = Shrink(0.4), random_params(SOURCE)
    grown = jax.device_get(grow_params(growth, params, SOURCE))
    moments = [grow_moment(growth, params, SOURCE, order) for order in (0, 1, 2)]

    def check(names, leaf, grown, *moments):
        factor = 0.4 if names.reads else 1.0
        np.testing.assert_allclose(grown, factor * leaf, rtol=1e-6)
        for order, moment in enumerate(moments):
            np.testing.assert_allclose(moment, leaf / factor**order, rtol=1e-6)

    jax.tree.map(check, model.logical_axes(SOURCE), params, grown, *moments)


@pytest.mark.parametrize(
    ("size", "depth", "layers"),
    [
        (2, 4, (0, 1, 1, 2, 2, 3)),
        (4, 8, (0, 1, 2, 3, 2, 3, 4, 5, 4, 5, 6, 7)),
        (2, 6, (0, 1, 2, 3, 2, 3, 4, 5)),
        (4, 4, (0, 1, 2, 3, 0, 1, 2, 3)),
    ],
)
def test_center_block_has_the_layers_around_the_middle(size, depth, layers):
    growth = InsertBlock(size, at="center")
    assert growth.sources(depth) == layers
    assert growth.source_depth(len(layers)) == depth


# Copies made by a split.


def unscaled_entries(params, config):
    """Returns parameters that a split copies without scaling, by axis."""
    layers = params["layers"]
    return {
        "embed": params["embedding"][: config.vocab_size],
        "mlp": layers["gate_up"],
        "heads": np.moveaxis(layers["query"], 2, -1),
    }


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    ("growth", "parts"),
    [
        (WidthSplit(embed=2, mlp=2, heads=2), False),
        (WidthSplit(embed=2, mlp=2, heads=2, split="uneven"), True),
        (WidthSplit(embed=2, mlp=2, heads=2, noise=0.1), True),
    ],
    ids=str,
)
def test_copies_diverge_only_after_an_uneven_or_noisy_split(growth, parts):
    assert growth.is_symmetric() == (not parts)
    phase = grown_phase(growth)
    tx = optimizer_of(phase.model)
    step = jax.jit(functools.partial(train_step, phase, tx, 0.0, phase.step_inputs))
    state = grow_jitted(growth, tx, trained_source(), "grow")
    for seed in range(3):
        state, _ = step(state, random_batch(seed))
    for axis, leaf in unscaled_entries(jax.device_get(state.params), phase.model).items():
        first, second = np.split(leaf, 2, axis=-1)
        gap = np.abs(first - second).max() / np.abs(leaf).max()
        # Three steps of 0.01 against entries near 1, or float32 rounding.
        assert gap > 1e-3 if parts else gap < 1e-5, axis


# Learned growth.


@pytest.mark.parametrize("name", ["learn depth", "learn width", "learn both"])
def test_learned_growth_starts_as_identity_and_stack(name):
    growth, params = GROWTHS[name], random_params(SOURCE)
    grown = jax.device_get(grow_params(growth, params, SOURCE))
    maps = growth.axis_maps(SOURCE)

    def check(leaf, source, names):
        for axis, axis_name in enumerate(names.names):
            if axis_name == "layers" and "layers" in maps:
                source = np.take(source, maps["layers"].sources, axis=axis)
            else:
                leaf = np.take(leaf, range(source.shape[axis]), axis=axis)
        np.testing.assert_allclose(leaf, source, rtol=1e-5, atol=1e-6)

    jax.tree.map(check, grown, params, model.logical_axes(SOURCE))


def test_learned_layer_is_a_sum_of_mapped_layers():
    """W'_l = sum_j D_lj B W_j A; the attention output uses the value map for its heads."""
    growth, rng = GROWTHS["learn both"], np.random.default_rng(0)
    axes, params = model.logical_axes(SOURCE), random_params(SOURCE)
    maps = jax.tree.map(
        lambda leaf: rng.normal(size=leaf.shape).astype(np.float32),
        jax.eval_shape(lambda: growth.init_maps(axes, SOURCE, key=KEY)),
    )
    grown = jax.jit(lambda m, p: growth.materialize(m, p, axes, SOURCE))(maps, params)
    m = jax.tree.map(np.float64, maps)
    p = jax.tree.map(np.float64, params)
    group = SOURCE.num_heads // SOURCE.num_kv_heads
    value_of_query = np.kron(
        m["value"].transpose(0, 2, 1, 3).reshape(4, 2, 6, 6).transpose(2, 3, 0, 1),
        np.eye(group),
    ).transpose(2, 0, 3, 1)  # [target head, H, source head, H]
    mixed = {
        k: np.einsum("jl,l...->j...", d, p["layers"][k])
        for k, d in m["layers"].items()
        if k != "gate_up"
    }
    expected = {
        "attention_norm": mixed["attention_norm"] @ m["embed"].T,
        "query": np.einsum("ed,ldnh,mgnh->lemg", m["embed"], mixed["query"], m["query"]),
        "value": np.einsum("ed,ldnh,mgnh->lemg", m["embed"], mixed["value"], m["value"]),
        "out": np.einsum("mgnh,lnhd,ed->lmge", value_of_query, mixed["out"], m["embed"]),
        "down": np.einsum("gf,lfd,ed->lge", m["mlp"], mixed["down"], m["embed"]),
        "gate_up": np.einsum(
            "ijl,ldif,ed,gf->jeig",
            m["layers"]["gate_up"],
            p["layers"]["gate_up"],
            m["embed"],
            m["mlp"],
        ),
    }
    for name, value in expected.items():
        np.testing.assert_allclose(grown["layers"][name], value, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(grown["head"], m["embed"] @ p["head"], rtol=1e-4, atol=1e-4)


def test_fit_lowers_the_loss_and_keeps_the_source_fixed():
    growth = Learn(2, embed=2, mlp=2, heads=2)
    phase = phase_of(
        growth.target_config(SOURCE),
        fit=growth.fit(SOURCE),
        source=SOURCE,
        growth=growth,
        reparameterizations=(growth.fit(SOURCE),),
    )
    tx = fit_transformation(OPTIMIZER)
    source = trained_source().params
    start = functools.partial(fit_state, phase.fit, SOURCE, tx)
    state, losses = jax.jit(start)(source, KEY), []
    step = jax.jit(functools.partial(train_step, phase, tx, 0.0, phase.step_inputs))
    for _ in range(12):
        state, metrics = step(state, random_batch())
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0] - 0.1
    assert_same_tree(state.params["source"], jax.tree.map(np.asarray, source))
    grown = jax.eval_shape(phase.model_params, state.params, phase.tokens(state.step))
    assert shapes(grown) == shapes(jax.eval_shape(lambda: model.init(phase.model, KEY)))


# Invalid growths.


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Stack(0), "stack.factor is 0; it must be at least 1"),
        (lambda: Interleave(-1), "interleave.factor is -1; it must be at least 1"),
        (lambda: LayerMap(()), r"layer_map.layers is \(\); it must be from 1 to 10000 long"),
        (lambda: LayerMap((0, -1)), "layer_map.layers.1 is -1; it must be at least 0"),
        (lambda: LayerMap("1-0"), "patterns count from 1"),
        (lambda: chain(), r"chain.growths is \(\); it must be from 1 to 64 long"),
        (
            lambda: LayerMap((0, 6)).target_config(tiny_model(num_layers=6)),
            r"LayerMap \(0, 6\) names layer 6 \(counted from 0\) of a model with 6 layers",
        ),
        (
            lambda: LayerMap("1-7").target_config(tiny_model(num_layers=6)),
            r"LayerMap '1-7' names layer 7 \(counted from 1\) of a model with 6 layers",
        ),
        (
            lambda: Stack(4).source_config(tiny_model(num_layers=6)),
            r"Stack\(factor=4\) does not fit model.num_layers 6: 4 does not divide 6",
        ),
        (
            lambda: LayerMap("12-3*2").source_config(tiny_model(num_layers=6)),
            r"LayerMap '12-3\*2' makes 4 layers, but the target has model.num_layers 6",
        ),
        (lambda: DepthUpscale(0), "depth_upscale.drop is 0; it must be at least 1"),
        (lambda: DepthUpscale(2).target_config(SOURCE), "drop at most half of them"),
        (lambda: InsertBlock(0), "insert_block.size is 0; it must be at least 1"),
        (
            lambda: InsertBlock(2).target_config(SOURCE),
            r"InsertBlock\(size=2\) does not fit model.num_layers 3: 2 does not divide 3",
        ),
        (
            lambda: InsertBlock(1, at="center").target_config(tiny_model(num_layers=2)),
            r"insert_block\(size=1, at=center\) copies half of each of two blocks",
        ),
        (lambda: InsertBlock(3).source_config(SOURCE), "nothing would be left to grow from"),
        (lambda: DepthZero(0), "depth_zero.factor is 0; it must be at least 1"),
        (lambda: DepthRandom(2, 0), "depth_random.mask_tokens is 0; it must be at least 1"),
        (lambda: DepthRandom(0, 1), "depth_random.factor is 0; it must be at least 1"),
        (lambda: DepthRandom(2, 1).source_config(SOURCE), "2 does not divide 3"),
        (
            lambda: WidthRandom(embed=2, mask_tokens=-1),
            "width_random.mask_tokens is -1; it must be at least 1",
        ),
        (
            lambda: WidthSplit(embed=Fraction(1, 2)),
            "width_split.embed is 1/2; it must be at least 1",
        ),
        (
            lambda: WidthSplit(heads=Fraction(3, 2)),
            "width_split.heads is 3/2, of type Fraction; it must be a whole",
        ),
        (
            lambda: WidthSplit(embed=2, noise=-1.0),
            "width_split.noise is -1.0; it must be at least 0",
        ),
        (
            lambda: WidthSplit(embed=Fraction(4, 3)).target_config(SOURCE),
            r"grows model.embed_dim 16 4/3 times, which is 21.3333; choose a ratio",
        ),
        (
            lambda: WidthSplit(mlp=3).source_config(SOURCE),
            r"cannot make model.mlp_dim 20, 3 times as many as 20/3",
        ),
        (
            lambda: WidthSplit(heads=1, kv_heads=3).target_config(SOURCE),
            r"cannot grow 2 key/value heads 3 times: 2 query heads each",
        ),
        (
            lambda: WidthZero(heads=1, kv_heads=2).target_config(SOURCE),
            "heads must grow at least as much, or old queries would read new keys",
        ),
        (lambda: Noise(1.5), "noise.alpha is 1.5; it must be at least 0 and at most 1"),
        (lambda: Learn(2, fit_steps=0), "learn.fit_steps is 0; it must be at least 1"),
        (
            lambda: chain(DepthRandom(2, 1), Stack(2)),
            r"stack\(2\) follows depth_random\(factor=2, mask_tokens=1\) in a chain",
        ),
        (
            lambda: chain(DepthRandom(2, 1), DepthRandom(3, 1)).reparameterizations(SOURCE),
            "grows layers behind masks twice; use one operator",
        ),
    ],
)
def test_invalid_growths_are_rejected_with_the_reason(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    "growth",
    [
        "stack(4)",
        "interleave(2)",
        "insert_block(size=4)",
        "depth_zero(factor=2)",
        "depth_random(factor=2, mask_tokens=9, phases=bottom_up)",
        "learn(factor=2)",
    ],
)
def test_growth_by_copies_of_no_layers_is_refused(growth):
    with pytest.raises(UserError, match=r"grows layers, and model\.num_layers is 0; .*fresh"):
        parse_growth(growth).target_config(tiny_model(num_layers=0))
    target = parse_growth("depth_fresh(3)").target_config(tiny_model(num_layers=0))
    assert target.num_layers == 3
