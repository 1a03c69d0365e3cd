"""The laws that every growth operator obeys, over one table of operators."""

import dataclasses
import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import COPIES, MODELS, mesh_of, phase_of, random_batch, random_params, tiny_model

from stackjax import model
from stackjax.axes import Axes
from stackjax.config import OptimizerConfig
from stackjax.growth import Interleave, LayerMap, Stack, chain
from stackjax.model import ModelConfig
from stackjax.optimizer import build_optimizer
from stackjax.sharding import on_mesh
from stackjax.train_state import TrainState, grow_state, init_state, train_step

SOURCE = tiny_model()
KEY = jax.random.key(0)
# Without decay, a parameter that changes has a gradient.
OPTIMIZER = OptimizerConfig(peak_learning_rate=1e-2, weight_decay=0.0)


@pytest.fixture(params=COPIES)
def growth(request):
    return COPIES[request.param][0]


@pytest.fixture
def sources(growth):
    """The source layer of every target layer, written out."""
    return next(layers for value, layers in COPIES.values() if value is growth)


def no_fresh(config: ModelConfig):
    raise AssertionError("copies need no new values")


def grow_params(growth, params, config):
    axes = model.logical_axes(config)
    return growth.grow_params(params, axes, config, key=KEY, fresh=no_fresh)


def optimizer_of(config):
    return build_optimizer(OPTIMIZER, model.logical_axes(config))


def shapes(tree):
    return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)


@pytest.mark.parametrize("name", ["gqa", "gqa, tied, qk_norm"])
def test_grown_parameters_are_shaped_and_axed_like_the_grown_config(growth, name):
    source = MODELS[name]
    target = growth.target_config(source)
    grown = jax.eval_shape(lambda p: grow_params(growth, p, source), random_params(source))
    expected = jax.eval_shape(lambda: model.init(target, KEY))
    assert shapes(grown) == shapes(expected)
    assert model.logical_axes(target) == model.logical_axes(source)


def test_only_the_depth_of_the_config_grows_and_shrinks_back(growth, sources):
    target = growth.target_config(SOURCE)
    assert target == dataclasses.replace(SOURCE, num_layers=len(sources))
    assert growth.source_config(target) == SOURCE


def test_every_grown_layer_is_its_source_layer_and_the_rest_is_as_it_was(growth, sources):
    params = random_params(SOURCE)
    grown = grow_params(growth, params, SOURCE)
    for name, leaf in params["layers"].items():
        expected = np.take(leaf, sources, axis=0)
        np.testing.assert_array_equal(grown["layers"].pop(name), expected)
    for name in params.keys() - {"layers"}:
        np.testing.assert_array_equal(grown[name], params[name])


def test_copied_layers_promise_nothing_about_the_function(growth):
    assert growth.promise == "no"


TREE_AXES = {"table": Axes(reads=("vocab",)), "w": Axes(("layers",), ("embed",), ("mlp",))}


def grow_tree(growth, depth):
    """A small tree of `depth` layers, grown."""
    tree = {"table": np.arange(3), "w": np.arange(depth * 2.0).reshape(depth, 2, 1)}
    config = dataclasses.replace(SOURCE, num_layers=depth)
    return growth.grow_params(tree, TREE_AXES, config, key=KEY, fresh=no_fresh)


def assert_same_tree(tree, other):
    assert shapes(tree) == shapes(other)
    jax.tree.map(np.testing.assert_array_equal, tree, other)


@pytest.mark.parametrize(("first", "second"), [(2, 3), (3, 2), (1, 4), (4, 1)])
@pytest.mark.parametrize("depth", [1, 3])
def test_stacking_twice_is_stacking_once_by_the_product(first, second, depth):
    twice = chain(Stack(factor=first), Stack(factor=second))
    assert_same_tree(grow_tree(twice, depth), grow_tree(Stack(factor=first * second), depth))


FACTORS = st.integers(1, 3)
OPERATORS = st.builds(Stack, factor=FACTORS) | st.builds(Interleave, factor=FACTORS)


@hypothesis.settings(max_examples=20, deadline=None)
@hypothesis.given(OPERATORS, OPERATORS, OPERATORS)
def test_chains_are_associative(a, b, c):
    assert chain(a, chain(b, c)) == chain(chain(a, b), c) == chain(a, b, c)
    assert chain(a, b).source_config(chain(a, b).target_config(SOURCE)) == SOURCE


def test_a_chain_applies_its_growths_from_first_to_last():
    table = [
        (chain(Stack(factor=2), LayerMap((0, 3, 2))), [0, 1, 0]),
        (chain(LayerMap((1, 0)), Stack(factor=2)), [1, 0, 1, 0]),
        (chain(LayerMap((1, 0)), Interleave(factor=2)), [1, 1, 0, 0]),
    ]
    for growth, layers in table:
        np.testing.assert_array_equal(grow_tree(growth, 2)["w"][:, 0, 0] / 2, layers)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Stack(factor=0), r"Stack needs a factor of at least 1, got 0\."),
        (lambda: Interleave(factor=-1), r"Interleave needs a factor of at least 1, got -1"),
        (lambda: LayerMap(()), r"LayerMap \(\) must name at least one layer"),
        (lambda: LayerMap((0, -1)), "must name at least one layer, counted from 0"),
        (lambda: LayerMap("1-0"), "patterns count from 1"),
        (lambda: chain(), "chain needs at least one growth"),
        (
            lambda: LayerMap((0, 6)).target_config(tiny_model(num_layers=6)),
            r"LayerMap \(0, 6\) names layer 6 \(counted from 0\) of a model with 6 layers",
        ),
        (
            lambda: LayerMap("1-7").target_config(tiny_model(num_layers=6)),
            r"LayerMap '1-7' names layer 7 \(counted from 1\) of a model with 6 layers",
        ),
        (
            lambda: Stack(factor=4).source_config(tiny_model(num_layers=6)),
            r"Stack\(factor=4\) does not fit model.num_layers 6: 4 does not divide 6",
        ),
        (
            lambda: LayerMap("12-3*2").source_config(tiny_model(num_layers=6)),
            r"LayerMap '12-3\*2' makes 4 layers, but the target has model.num_layers 6",
        ),
    ],
)
def test_growths_that_cannot_be_are_refused_with_the_reason(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@functools.cache
def compiled_step(config):
    tx = optimizer_of(config)
    return jax.jit(functools.partial(train_step, phase_of(config), tx, 0.0))


@functools.cache
def trained_source() -> TrainState:
    """The source after a step, so that its moments are not zero."""
    params = random_params(SOURCE)
    state = TrainState(jnp.int32(0), params, optimizer_of(SOURCE).init(params))
    state, _ = compiled_step(SOURCE)(state, random_batch())
    return state


def moments(state) -> optax.ScaleByAdamState:
    (found,) = (node for node in state.opt_state if isinstance(node, optax.ScaleByAdamState))
    return found


@pytest.mark.parametrize("keep", ["reset", "grow"])
def test_a_grown_optimizer_state_is_the_one_of_the_grown_model(growth, keep):
    target, state = growth.target_config(SOURCE), trained_source()
    tx = optimizer_of(target)
    if keep == "reset":
        state = dataclasses.replace(state, opt_state=None)
    grown = jax.eval_shape(lambda s: grow_state(growth, SOURCE, tx, s, KEY, keep), state)
    expected = jax.eval_shape(lambda: init_state(target, tx, KEY))
    assert jax.tree.structure(grown) == jax.tree.structure(expected)
    assert shapes(grown) == shapes(expected)


def test_moments_of_a_grown_layer_are_those_of_its_source(growth, sources):
    state = trained_source()
    grown = grow_state(growth, SOURCE, optimizer_of(SOURCE), state, KEY, "grow")
    assert (int(grown.step), int(moments(grown).count)) == (0, 1)
    for kind in ("mu", "nu"):
        before, after = getattr(moments(state), kind), getattr(moments(grown), kind)
        for name, leaf in before["layers"].items():
            expected = np.take(np.asarray(leaf), sources, axis=0)
            np.testing.assert_array_equal(after["layers"][name], expected)
        np.testing.assert_array_equal(after["embedding"], before["embedding"])


def test_a_reset_optimizer_forgets_what_the_source_had_seen(growth):
    state = dataclasses.replace(trained_source(), opt_state=None)
    grown = grow_state(growth, SOURCE, optimizer_of(SOURCE), state, KEY, "reset")
    assert int(moments(grown).count) == 0
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(moments(grown).nu))


def test_a_stage_without_growth_keeps_parameters_and_moments():
    state = trained_source()
    kept = grow_state(None, SOURCE, optimizer_of(SOURCE), state, KEY, "keep")
    assert int(kept.step) == 0
    assert_same_tree(
        (kept.params, moments(kept).mu, moments(kept).count),
        (state.params, moments(state).mu, moments(state).count),
    )


@pytest.mark.parametrize("keep", ["reset", "grow"])
def test_within_two_steps_of_growth_every_parameter_learns(growth, keep):
    target, state = growth.target_config(SOURCE), trained_source()
    if keep == "reset":
        state = dataclasses.replace(state, opt_state=None)
    grown = grow_state(growth, SOURCE, optimizer_of(target), state, KEY, keep)
    state = grown
    for seed in (1, 2):
        state, _ = compiled_step(target)(state, random_batch(seed))
    seen = np.unique(random_batch(1).tokens)
    for name, leaf in state.params["layers"].items():
        assert (leaf != grown.params["layers"][name]).mean() > 0.99, name
    assert (state.params["embedding"][seen] != grown.params["embedding"][seen]).all()
    assert (state.params["final_norm"] != grown.params["final_norm"]).all()
    head = state.params["head"][:, : SOURCE.vocab_size]
    assert (head != grown.params["head"][:, : SOURCE.vocab_size]).all()


def test_growth_under_jit_on_eight_devices_is_growth_on_one_and_keeps_the_sharding(growth):
    target = growth.target_config(SOURCE)
    on_one = grow_state(growth, SOURCE, optimizer_of(target), trained_source(), KEY, "grow")
    mesh = mesh_of("replica 2, fsdp 2, tensor 2")
    with jax.set_mesh(mesh):
        tx = optimizer_of(target)
        grow = jax.jit(functools.partial(grow_state, growth, SOURCE, tx, moments="grow"))
        source = jax.eval_shape(lambda: init_state(SOURCE, tx, KEY))
        layout = jax.tree.map(lambda leaf: leaf.sharding, on_mesh(source, mesh))
        grown = grow(jax.device_put(trained_source(), layout), key=KEY)
        expected = on_mesh(jax.eval_shape(lambda: init_state(target, tx, KEY)), mesh)
        for leaf, abstract in zip(
            jax.tree.leaves(grown), jax.tree.leaves(expected), strict=True
        ):
            assert leaf.sharding.is_equivalent_to(abstract.sharding, leaf.ndim)
    assert not grown.params["layers"]["down"].sharding.is_fully_replicated
    assert_same_tree(jax.device_get(grown), jax.device_get(on_one))
