"""Growth along experts, checked in float64 by a numpy decoder with a loop over experts."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import tiny_model
from decoder import logits_of_documents
from float64_growth import fits, grow, source_params

from stackjax import model
from stackjax.growth import (
    DepthFresh,
    DepthRandom,
    DepthZero,
    ExpertsCopy,
    Interleave,
    LayerMap,
    Learn,
    Noise,
    Shrink,
    Stack,
    Upcycle,
    WidthRandom,
    WidthSplit,
    WidthZero,
    chain,
    parse_growth,
)
from stackjax.growth.axis_map import is_new
from stackjax.growth.grow_tree import split_tree
from stackjax.model.layer_kind import LayerKind
from stackjax.model.routing_config import Routing
from stackjax.optimizers import AdamW, Muon
from stackjax.runtime.errors import UserError
from stackjax.training.train_state import TrainState, grow_state

T = 6
TOKENS = np.random.default_rng(0).integers(0, 11, (1, T))
POSITIONS = np.arange(T)[None]
SEGMENTS = np.zeros((1, T), int)
# As in test_function_preserving.
FLOAT64 = 1e-12
DIFFERENT = 1e-6
KEY = jax.random.key(0)


def logits(config, params):
    return logits_of_documents(config, params, TOKENS)


def experts(**fields):
    sizes = {"num_experts": 4, "expert_dim": 10, "routing": Routing(top_k=2)}
    return tiny_model(**(sizes | fields))


DENSE = tiny_model()
SOURCES = {
    "dense": DENSE,
    "dense, sigmoid, scaled": tiny_model(
        routing=Routing(top_k=1, score="sigmoid", scale=2.5, balance="bias")
    ),
    "dense, norm after": tiny_model(
        norm_placement="after", routing=Routing(top_k=1, balance="bias")
    ),
    "experts": experts(),
    "shared, not normalized": experts(
        num_shared_experts=2, routing=Routing(top_k=2, normalize=False, balance="none")
    ),
    "sigmoid, bias": experts(routing=Routing(top_k=3, score="sigmoid", balance="bias")),
    "sigmoid, not normalized": experts(
        routing=Routing(top_k=1, score="sigmoid", normalize=False, scale=1.5)
    ),
}
GROWTHS = {
    "upcycle": Upcycle(8, 2),
    "upcycle, one expert": Upcycle(4, 1),
    "upcycle, all experts, not normalized": Upcycle(4, 4, normalize=False),
    "granular": Upcycle(8, 2, granularity=2),
    "granular, more copies": Upcycle(8, 8, granularity=4),
    "upcycle, then depth": chain(Upcycle(4, 2), DepthZero(2)),
    "width, then upcycle, then experts": chain(
        WidthSplit(embed=2, mlp=2), Upcycle(4, 2), ExpertsCopy(2, top_k="grow")
    ),
    "upcycle, then width": chain(Upcycle(4, 2, granularity=2), WidthSplit(mlp=2, embed=2)),
    "copies": ExpertsCopy(2, top_k="grow"),
    "three copies, then zeros": chain(ExpertsCopy(3, top_k="grow"), WidthZero(mlp=2, embed=2)),
    "depth zero": DepthZero(2),
    "width": WidthSplit(embed=2, mlp=2, heads=2, split="uneven"),
    "width zero": WidthZero(embed=2, mlp=2, heads=2),
    "width random": WidthRandom(embed=2, mlp=2, mask_tokens=64),
    "depth random": DepthRandom(2, mask_tokens=64),
}
CHANGING = {
    "top_k no multiple": Upcycle(8, 3, granularity=2),
    "not normalized": Upcycle(8, 2, normalize=False),
    "dropped": Upcycle(4, 2, drop=0.5),
    "top_k kept": ExpertsCopy(2),
    "noisy router": ExpertsCopy(2, top_k="grow", noise=0.5),
    "stack": Stack(2),
    "interleave": Interleave(2),
    "fresh": DepthFresh(2),
    "shrink": Shrink(0.5),
    "noise": Noise(0.2),
}


def shapes(tree):
    return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)


def cases(growths):
    return [
        pytest.param(growth, config, id=f"{name}-{source}")
        for source, config in SOURCES.items()
        for name, growth in growths.items()
        # Operators of depth and width are tested with dense sources elsewhere.
        if fits(growth, config) and (config.num_experts or "upcycle" in str(growth))
    ]


def distance(growth, config):
    target, params = grow(growth, config, closes_masks=True)
    return np.abs(logits(target, params) - logits(config, source_params(config))).max()


@pytest.mark.sample(3)
@pytest.mark.parametrize(("growth", "config"), cases(GROWTHS))
def test_preserving_growth_keeps_the_logits(growth, config):
    assert growth.preserves_function != "never"
    assert distance(growth, config) < FLOAT64


@pytest.mark.sample(3)
@pytest.mark.parametrize(("growth", "config"), cases(CHANGING))
def test_other_growth_changes_the_logits(growth, config):
    if growth == ExpertsCopy(2) and config.routing.top_k == 1:
        # Of equal copies, the router takes the first.
        assert distance(growth, config) < FLOAT64
        return
    assert growth.preserves_function == "never"
    assert distance(growth, config) > DIFFERENT


@pytest.mark.sample(3)
@pytest.mark.parametrize(("growth", "config"), cases(GROWTHS | CHANGING))
def test_grown_parameters_have_the_targets_shapes_and_text(growth, config):
    target = growth.target_config(config)
    fresh = functools.partial(model.init, key=KEY)
    grown = jax.eval_shape(
        lambda params: growth.target_params(
            params, model.logical_axes(config), config, key=KEY, fresh=fresh
        ),
        jax.eval_shape(lambda: fresh(config)),
    )
    assert shapes(grown) == shapes(jax.eval_shape(lambda: fresh(target)))
    assert growth.target_axes(model.logical_axes(config), config) == model.logical_axes(target)
    source = growth.source_config(target)
    assert growth.target_config(source) == target
    assert parse_growth(str(growth)) == growth


# Moments against gradients of the grown model.


def loss(config, params):
    """The sum of squared logits, in float64."""
    run = dataclasses.replace(config, compute_dtype="float32")
    found = model.apply(run, params, TOKENS, POSITIONS, SEGMENTS)[..., : config.vocab_size]
    return jnp.sum(jnp.square(found))


EXACT_GRADIENTS = {
    "copies, normalized": (ExpertsCopy(2, top_k="grow"), "experts"),
    "copies, not normalized": (ExpertsCopy(2, top_k="grow"), "shared, not normalized"),
    "copies, sigmoid": (ExpertsCopy(3, top_k="grow"), "sigmoid, bias"),
    "copies, sigmoid, not normalized": (
        ExpertsCopy(2, top_k="grow"),
        "sigmoid, not normalized",
    ),
}


@pytest.mark.parametrize("name", EXACT_GRADIENTS)
@pytest.mark.parametrize("order", [1, 2])
def test_moments_of_copies_grow_like_gradients(name, order):
    growth, source = EXACT_GRADIENTS[name]
    config, target = SOURCES[source], growth.target_config(SOURCES[source])
    params = jax.tree.map(jnp.float32, source_params(config))
    axes = model.logical_axes(config)
    with jax.default_matmul_precision("highest"):
        gradient = jax.jit(jax.grad(functools.partial(loss, config)))(params)
        grown = growth.target_params(params, axes, config, key=KEY, fresh=None)
        expected = jax.jit(jax.grad(functools.partial(loss, target)))(grown)
    moment = jax.tree.map(lambda g: g**order, gradient)
    found = growth.target_moment(moment, axes, config, order=order)
    scale = max(jnp.abs(leaf).max() for leaf in jax.tree.leaves(gradient)) ** order
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other**order, rtol=0, atol=1e-4 * scale)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("granularity", [1, 2])
def test_moments_of_upcycled_experts_sum_to_those_of_the_mlp(normalize, granularity):
    # With equal shares and all experts, every expert has the expected gradient.
    growth = Upcycle(4, 4, granularity=granularity, normalize=normalize)
    config, target = DENSE, growth.target_config(DENSE)
    params, axes = jax.tree.map(jnp.float32, source_params(config)), model.logical_axes(DENSE)

    def zeros(model_config):
        return jax.tree.map(jnp.zeros_like, model.init(model_config, KEY))

    with jax.default_matmul_precision("highest"):
        gradient = jax.jit(jax.grad(functools.partial(loss, config)))(params)
        grown = growth.target_params(
            params,
            axes,
            config,
            key=KEY,
            fresh=zeros,
        )
        expected = jax.jit(jax.grad(functools.partial(loss, target)))(grown)
    found = growth.target_moment(gradient, axes, config, order=1)
    for name in ("expert_gate_up", "expert_down"):
        scale = jnp.abs(expected["layers"][name]).max()
        np.testing.assert_allclose(
            found["layers"][name], expected["layers"][name], rtol=0, atol=1e-4 * scale
        )
    assert not jnp.any(found["layers"]["router"])
    unknown = growth.unknown_moments(config)
    assert unknown.keys() == {"routes"} and unknown["routes"].all()


@pytest.mark.sample(5)
@pytest.mark.parametrize("optimizer", [AdamW, Muon])
@pytest.mark.parametrize("moments", ["grow", "keep", "reset"])
@pytest.mark.parametrize("name", ["upcycle", "upcycle, then depth", "copies"])
def test_state_grows_by_parts_like_the_whole_state(optimizer, moments, name):
    growth = GROWTHS[name]
    config = SOURCES["experts" if name == "copies" else "dense, sigmoid, scaled"]
    optimizer = optimizer(peak_learning_rate=1e-3)
    params, axes = model.init(config, KEY), model.logical_axes(config)
    opt_state = optimizer.build(axes).init(params)
    opt_state = jax.tree.map(lambda leaf: leaf + 1 if leaf.ndim else leaf, opt_state)
    state = TrainState(jnp.int32(3), params, opt_state)
    target = growth.target_config(config)

    @functools.partial(jax.jit, static_argnums=0)
    def run(part, state):
        parts = axes if part is None else split_axes(part)
        tx = optimizer.build(growth.target_axes(parts, config))
        return grow_state(growth, config, tx, state, KEY, moments)

    names = sorted(axes["layers"])

    def split_axes(name):
        return {"layers": {name: axes["layers"][name]}}

    whole = run(None, state)
    expected = optimizer.build(model.logical_axes(target)).init(whole.params)
    assert shapes(whole.opt_state) == shapes(expected)
    found = {}
    for each in names:
        part = {"layers": {each: params["layers"][each]}}
        tree = jax.tree.structure(optimizer.build(split_axes(each)).init(part))
        leaves = optimizer.build(split_axes(each)).init(part)
        leaves = jax.tree.leaves(
            jax.tree.map(lambda leaf: leaf + 1 if leaf.ndim else leaf, leaves)
        )
        grown = run(each, TrainState(state.step, part, jax.tree.unflatten(tree, leaves)))
        found |= grown.params["layers"]
    assert found.keys() == whole.params["layers"].keys()
    for each, leaf in found.items():
        np.testing.assert_array_equal(leaf, whole.params["layers"][each])
    assert len(list(split_tree(axes))) > len(names)


# Experts after growth.


def test_granular_experts_are_slices_in_virtual_groups():
    growth = Upcycle(8, 2, granularity=4)
    params = source_params(DENSE)
    _, grown = grow(growth, DENSE)
    units = DENSE.mlp_dim // 4
    for e in range(8):
        part = slice(units * (e % 4), units * (e % 4 + 1))
        gate_up = params["layers"]["gate_up"][..., part]
        np.testing.assert_array_equal(grown["layers"]["expert_gate_up"][:, e], gate_up)
        down = 4 * params["layers"]["down"][:, part]
        np.testing.assert_array_equal(grown["layers"]["expert_down"][:, e], down)
    router = grown["layers"]["router"]
    np.testing.assert_array_equal(router[..., :4], np.repeat(router[..., :1], 4, axis=-1))
    assert np.ptp(router[..., ::4], axis=-1).min() > 0


def test_a_dropped_unit_loses_gate_value_and_output():
    _, whole = grow(Upcycle(4, 2), DENSE)
    _, grown = grow(Upcycle(4, 2, drop=0.5), DENSE)
    changed = {
        name: whole["layers"][name] != grown["layers"][name]
        for name in ("expert_gate_up", "expert_down")
    }
    is_dropped = changed["expert_down"].all(axis=-1)
    np.testing.assert_array_equal(is_dropped, changed["expert_down"].any(axis=-1))
    for half in range(2):
        np.testing.assert_array_equal(
            is_dropped, changed["expert_gate_up"][:, :, :, half].all(axis=2)
        )
    assert (is_dropped.sum(axis=-1) == DENSE.mlp_dim // 2).all()
    # Each expert has its own units.
    assert (is_dropped[:, 0] != is_dropped[:, 1]).any()


def test_new_entries_of_experts_are_all_copies_besides_the_first():
    growth, axes = Upcycle(4, 2), model.logical_axes(Upcycle(4, 2).target_config(DENSE))
    maps = growth.axis_maps(DENSE)
    new = {name: np.asarray(is_new(names, maps)) for name, names in axes["layers"].items()}
    assert new["router"].all()
    assert [*np.ravel(new["expert_down"])] == [False, True, True, True]
    assert not new["attention_norm"].any()


MIXED = experts(num_layers=6, pattern=(LayerKind(dense=True), LayerKind(), LayerKind()))


def test_depth_growth_of_mixed_layers_maps_each_list_of_layers():
    maps = Stack(2).axis_maps(MIXED)
    assert maps["expert_layers"].sources == (0, 1, 2, 3) * 2
    assert maps["dense_layers"].sources == (0, 1) * 2
    maps = Interleave(2).axis_maps(MIXED)
    assert maps["expert_layers"].sources == (0, 1, 0, 1, 2, 3, 2, 3)
    assert maps["dense_layers"].sources == (0, 0, 1, 1)
    maps = DepthFresh(3).axis_maps(MIXED)
    assert maps["expert_layers"].sources == (0, 1, 2, 3, -1, -1)
    assert maps["dense_layers"].sources == (0, 1, -1)


@pytest.mark.parametrize("growth", [DepthZero(2), DepthZero(2, order="stack", rest="fresh")])
def test_mixed_layers_keep_the_function_under_zero_growth(growth):
    target = growth.target_config(MIXED)
    fresh, axes = functools.partial(model.init, key=KEY), model.logical_axes(MIXED)
    grown = jax.eval_shape(
        lambda: growth.target_params(fresh(MIXED), axes, MIXED, key=KEY, fresh=fresh)
    )
    assert shapes(grown) == shapes(jax.eval_shape(lambda: fresh(target)))
    assert distance(growth, MIXED) < FLOAT64


REFUSED = {
    "experts already": (Upcycle(4, 2), experts(), "has 4 experts already"),
    "slices": (Upcycle(6, 2, granularity=3), DENSE, "mlp_dim 20"),
    "sigmoid, not normalized": (
        Upcycle(4, 2, normalize=False),
        SOURCES["dense, sigmoid, scaled"],
        "normalizes sigmoid",
    ),
    "no experts": (ExpertsCopy(2), DENSE, r"begin with upcycle\(EXPERTS\)"),
    "learned": (Learn(2), experts(), "no maps for experts"),
    "first layers with experts": (
        DepthFresh(2),
        dataclasses.replace(MIXED, num_layers=1),
        "begin with a whole period",
    ),
    "kind would change": (LayerMap((1, 2, 3)), MIXED, "makes layer 0 .* from layer 1"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_growth_along_experts_is_refused_with_the_reason(name):
    growth, config, match = REFUSED[name]
    with pytest.raises(UserError, match=match):
        growth.target_config(config)


TARGETS = {
    "experts": (Upcycle(8, 2), experts(), "cannot make model.num_experts 4"),
    "units": (Upcycle(4, 2), experts(), "cannot make model.mlp_dim 20; .* must be 10"),
    "top_k": (Upcycle(4, 1, granularity=2), experts(), "top_k 2 and normalize True"),
    "mixed": (Upcycle(4, 2), dataclasses.replace(MIXED, mlp_dim=10), "some kinds"),
    "copies": (ExpertsCopy(3), experts(), "num_experts 4: 3 does not divide"),
    "copies of top_k": (
        ExpertsCopy(2, top_k="grow"),
        experts(routing=Routing(top_k=3)),
        "routing.top_k 3",
    ),
}


@pytest.mark.parametrize("name", TARGETS)
def test_targets_that_growth_along_experts_cannot_make(name):
    growth, config, match = TARGETS[name]
    with pytest.raises(UserError, match=match):
        growth.source_config(config)


def test_impossible_upcycling_is_refused():
    with pytest.raises(UserError, match="multiple of granularity 3"):
        Upcycle(4, 2, granularity=3)
    with pytest.raises(UserError, match="top_k 5"):
        Upcycle(4, 5)
    with pytest.raises(UserError, match="same parameters"):
        DepthRandom(2, 64).reparameterizations(MIXED)
