"""Function preservation of growth, judged in float64 by transformers."""

import dataclasses
import functools
from fractions import Fraction

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import judge
import numpy as np
import pytest
from conftest import GROWTHS, HALF_MORE, MODELS, tiny_model

from stackjax import model
from stackjax.growth import DepthRandom, DepthZero, WidthRandom, WidthSplit, WidthZero, chain
from stackjax.model.config import axis_size
from stackjax.sharding.axes import Axes

B, T = 2, 8
KEY = jax.random.key(0)
TOKENS = np.random.default_rng(0).integers(0, 11, (B, T), dtype=np.int32)
POSITIONS = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))
SEGMENTS = np.zeros((B, T), np.int32)

# Sums of a few dozen float64 numbers of size one, in another order.
FLOAT64 = 1e-12
# What counts as another function, of logits of size one.
DIFFERENT = 1e-3

OPERATORS = GROWTHS | {
    "split, key heads alone": WidthSplit(kv_heads=2),
    "split, groups cut in two": WidthSplit(heads=3, kv_heads=2, split="uneven"),
    "width random, queries alone": WidthRandom(
        embed=HALF_MORE, heads=3, kv_heads=1, mask_tokens=128, phases="together"
    ),
    "depth random, then all of width": chain(
        DepthRandom(2, 128, order="stack"),
        WidthRandom(embed=2, mlp=HALF_MORE, heads=2, mask_tokens=128),
    ),
}

# Of every growth behind masks: the layers of the target that are the source's, of three,
# and the token at which the mask along each axis starts to open; it opens over 128.
MASKS = {
    "depth random": ((0, 2, 4), {"layers": 0}),
    "depth random, stacked, copies": ((0, 1, 2), {"layers": 0}),
    "width random": ((0, 1, 2), {"mlp": 0, "embed": 128, "heads": 256}),
    "width random, copies": ((0, 1, 2), {"mlp": 0, "embed": 0, "heads": 0}),
    "width random, queries alone": ((0, 1, 2), {"embed": 0, "heads": 0}),
    "chain of masks": ((0, 2, 4), {"layers": 0, "mlp": 0}),
    "depth random, then all of width": (
        (0, 1, 2),
        {"layers": 0, "mlp": 0, "embed": 128, "heads": 256},
    ),
}
ALL_OPEN = 384


def can_grow(growth, config):
    try:
        growth.target_config(config)
    except ValueError:
        return False
    return True


def preserving(preservation, models=tuple(MODELS)):
    """Parametrizes a test by operators with this preservation, and models that fit."""
    cases = [
        pytest.param(name, MODELS[model_name], id=f"{model_name}-{name}")
        for model_name in models
        for name, growth in OPERATORS.items()
        if growth.preserves_function == preservation and can_grow(growth, MODELS[model_name])
    ]
    return pytest.mark.parametrize(("name", "config"), cases)


def random_values(config, axes, seed):
    """Parameters in float64; matrices keep the size of activations, gains are about one."""
    rng = np.random.default_rng(seed)

    def draw(names):
        shape = tuple(axis_size(config, axis) for axis in names.names)
        return rng.normal(size=shape) / 4 if names.reads else rng.uniform(0.5, 1.5, shape)

    return jax.tree.map(draw, axes, is_leaf=lambda node: isinstance(node, Axes))


def source_params(config):
    return random_values(config, model.logical_axes(config), seed=0)


def grow(growth, config):
    """The target's config and its parameters, grown out of the source's in float64."""
    axes = model.logical_axes(config)
    fresh = functools.partial(random_values, axes=axes, seed=1)
    draws = np.random.default_rng(2)

    def normal(key, shape, dtype=None):
        return jnp.asarray(draws.normal(size=shape), dtype)

    @jax.jit
    def run(params):
        return growth.grow_params(params, axes, config, key=KEY, fresh=fresh)

    with jax.enable_x64(True), pytest.MonkeyPatch.context() as patch:
        # Any noise will do, and to compile float64 draws takes longer than all the rest.
        patch.setattr(jax.random, "normal", normal)
        grown = jax.tree.map(np.asarray, run(source_params(config)))
    assert {leaf.dtype for leaf in jax.tree.leaves(grown)} == {np.dtype(np.float64)}
    return growth.target_config(config), grown


@functools.cache
def grow_operator(name, config):
    """What `grow` returns for the operator of that name."""
    return grow(OPERATORS[name], config)


@functools.cache
def source_logits(config):
    return judge.logits(config, source_params(config), TOKENS)


apply = jax.jit(model.apply, static_argnums=0)


def own_logits(config, params, compute_dtype):
    """Logits as the package computes them, from float32 parameters."""
    typed = dataclasses.replace(config, compute_dtype=compute_dtype)
    params = jax.tree.map(np.float32, params)
    return apply(typed, params, TOKENS, POSITIONS, SEGMENTS)[..., : config.vocab_size]


def distance(logits, others):
    """The largest difference between logits."""
    return np.abs(logits - others).max()


def test_the_model_computes_what_transformers_does(config):
    params = jax.tree.map(np.float32, source_params(config))
    logits = own_logits(config, params, "float32")
    expected = judge.logits(config, params, TOKENS)
    assert 0.5 < expected.std() < 2
    # Float32 through three layers: a few roundings of logits of size one.
    assert distance(logits, expected) < 1e-5


@preserving("always")
def test_an_exact_growth_keeps_the_function(name, config):
    logits = judge.logits(*grow_operator(name, config), TOKENS)
    assert distance(logits, source_logits(config)) < FLOAT64


@preserving("never")
def test_other_growth_changes_the_function(name, config):
    logits = judge.logits(*grow_operator(name, config), TOKENS)
    assert distance(logits, source_logits(config)) > DIFFERENT


@functools.cache
def reparameterise(name, config):
    """A function of parameters and tokens since growth: the parameters that the model runs."""
    axes = model.logical_axes(config)

    def run(params, tokens):
        for reparameterization in OPERATORS[name].reparameterizations(config):
            params = reparameterization.model_params(params, axes, tokens)
        return params

    return jax.jit(run)


def running_params(name, config, tokens):
    """The target's config and the parameters it runs, so many tokens after growth."""
    target, params = grow_operator(name, config)
    with jax.enable_x64(True):
        running = reparameterise(name, config)(params, np.float64(tokens))
    return target, jax.tree.map(np.asarray, running)


@preserving("at_start")
def test_growth_behind_closed_masks_starts_with_the_function(name, config):
    logits = judge.logits(*running_params(name, config, 0), TOKENS)
    assert distance(logits, source_logits(config)) < FLOAT64


@preserving("at_start")
def test_open_masks_leave_parameters_as_they_are_and_let_in_what_is_new(name, config):
    target, params = running_params(name, config, ALL_OPEN)
    jax.tree.map(np.testing.assert_array_equal, params, grow_operator(name, config)[1])
    logits = judge.logits(target, params, TOKENS)
    assert distance(logits, source_logits(config)) > DIFFERENT


def masks_at(name, source, target, tokens):
    """The mask along every axis: 1 for what the source has, less for the rest."""
    layers, starts = MASKS[name]
    group = target.num_heads // target.num_kv_heads
    kv_head, slot = np.divmod(np.arange(target.num_heads), group)
    from_source = {
        "layers": np.isin(np.arange(target.num_layers), layers),
        "embed": np.arange(target.embed_dim) < source.embed_dim,
        "mlp": np.arange(target.mlp_dim) < source.mlp_dim,
        "heads": (kv_head < source.num_kv_heads)
        & (slot < source.num_heads // source.num_kv_heads),
    }
    return {
        axis: np.where(from_source[axis], 1, np.clip((tokens - start) / 128, 0, 1))
        for axis, start in starts.items()
    }


@preserving("at_start")
def test_masked_parameters_compute_the_model_with_masked_activations(name, config):
    _, unmasked = grow_operator(name, config)
    for tokens in (32, 100, 200, 300):
        target, params = running_params(name, config, tokens)
        masks = masks_at(name, config, target, tokens)
        expected = judge.logits(target, unmasked, TOKENS, masks)
        assert distance(judge.logits(target, params, TOKENS), expected) < FLOAT64


@preserving("always", models=["gqa, tied, qk_norm"])
def test_an_exact_growth_keeps_the_function_in_the_types_that_models_train_in(name, config):
    models = (config, source_params(config)), grow_operator(name, config)
    source, grown = (own_logits(*each, "float32") for each in models)
    # A few roundings of float32, of logits of size one.
    assert distance(source, grown) < 1e-5
    source, grown = (own_logits(*each, "bfloat16") for each in models)
    # Products of eight bits leave each model 0.01 from float64 in the root mean square, and
    # 0.04 at most. The two round apart unless growth multiplies by powers of two.
    assert np.sqrt(np.mean(np.square(grown - source))) < 3e-2
    assert distance(source, grown) < 0.1


@st.composite
def small_models(draw):
    num_kv_heads = draw(st.integers(1, 2))
    return tiny_model(
        vocab_multiple=1,
        num_layers=draw(st.integers(1, 2)),
        embed_dim=draw(st.integers(2, 5)),
        mlp_dim=draw(st.integers(1, 4)),
        num_heads=num_kv_heads * draw(st.integers(1, 3)),
        num_kv_heads=num_kv_heads,
        head_dim=2,
        tie_head=draw(st.booleans()),
        qk_norm=draw(st.booleans()),
        qkv_bias=draw(st.booleans()),
    )


@st.composite
def width_ratios(draw, source):
    """Ratios that a source can grow by, whole and not."""
    group = source.num_heads // source.num_kv_heads
    heads = draw(st.integers(1, 3))
    kv_heads = [ratio for ratio in (1, 2, 3) if group * heads % ratio == 0]
    return {
        "embed": Fraction(draw(st.integers(source.embed_dim, 12)), source.embed_dim),
        "mlp": Fraction(draw(st.integers(source.mlp_dim, 10)), source.mlp_dim),
        "heads": heads,
        "kv_heads": draw(st.sampled_from(kv_heads)),
    }


@st.composite
def width_splits(draw, source):
    split = draw(st.sampled_from(["even", "uneven"]))
    noise = draw(st.sampled_from([0.0, 0.3]))
    return WidthSplit(**draw(width_ratios(source)), split=split, noise=noise)


@st.composite
def width_zeros(draw, source):
    ratios = draw(width_ratios(source))
    hypothesis.assume(ratios["kv_heads"] <= ratios["heads"])
    return WidthZero(**ratios)


def depth_zeros(source):
    return st.builds(
        DepthZero,
        factor=st.integers(1, 3),
        order=st.sampled_from(["interleave", "stack"]),
        rest=st.sampled_from(["copy", "fresh"]),
    )


def exact_growths(source):
    return width_splits(source) | width_zeros(source) | depth_zeros(source)


@st.composite
def chains(draw, source):
    first = draw(exact_growths(source))
    return chain(first, draw(exact_growths(first.target_config(source))))


@pytest.mark.parametrize("growths", [width_splits, width_zeros, depth_zeros, chains])
@hypothesis.settings(max_examples=8, deadline=None)
@hypothesis.given(data=st.data())
def test_exact_growths_of_any_size_keep_the_function(growths, data):
    source = data.draw(small_models(), "source")
    growth = data.draw(growths(source), "growth")
    expected = judge.logits(source, source_params(source), TOKENS)
    assert distance(judge.logits(*grow(growth, source), TOKENS), expected) < FLOAT64
