"""Function preservation of growth, checked in float64 against transformers."""

import dataclasses
import functools
from fractions import Fraction

import hypothesis
import hypothesis.strategies as st
import jax
import judge
import numpy as np
import pytest
from conftest import GROWTHS, HALF_MORE, MODELS, tiny_model
from float64_growth import fits, grow, source_params

from stackjax import model
from stackjax.growth import DepthRandom, DepthZero, WidthRandom, WidthSplit, WidthZero, chain

B, T = 2, 8
KEY = jax.random.key(0)
TOKENS = np.random.default_rng(0).integers(0, 11, (B, T), dtype=np.int32)
POSITIONS = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))
SEGMENTS = np.zeros((B, T), np.int32)

# Tolerance for sums of a few dozen float64 numbers near 1, added in another order.
FLOAT64 = 1e-12
# Smallest difference between the logits of two different functions; logits are near 1.
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

# For each masked growth: the target layers copied from the three source layers, and the
# token count at which each axis mask starts to open. A mask opens over 128 tokens, or over
# these tokens in each target layer.
MASKS = {
    "depth random": ((0, 2, 4), {"layers": 0}),
    "depth random, stacked, copies": ((0, 1, 2), {"layers": 0}),
    "depth random, bottom up": ((0, 2, 4), {"layers": 0}),
    "width random": ((0, 1, 2), {"mlp": 0, "embed": 128, "heads": 256}),
    "width random, copies": ((0, 1, 2), {"mlp": 0, "embed": 0, "heads": 0}),
    "width random, queries alone": ((0, 1, 2), {"embed": 0, "heads": 0}),
    "chain of masks": ((0, 2, 4), {"layers": 0, "mlp": 0}),
    "depth random, then all of width": (
        (0, 1, 2),
        {"layers": 0, "mlp": 0, "embed": 128, "heads": 256},
    ),
}
OPENS_OVER = {"depth random, bottom up": np.array([1, 128 / 3, 1, 256 / 3, 1, 128])}
ALL_OPEN = 384


def preserving(preservation, models=tuple(MODELS)):
    """Parametrizes a test over operators with this preservation and their valid models."""
    cases = [
        pytest.param(name, MODELS[model_name], id=f"{model_name}-{name}")
        for model_name in models
        for name, growth in OPERATORS.items()
        if growth.preserves_function == preservation and fits(growth, MODELS[model_name])
    ]
    return pytest.mark.parametrize(("name", "config"), cases)


@functools.cache
def grow_operator(name, config):
    """Returns the cached result of `grow` for a named operator."""
    return grow(OPERATORS[name], config)


@functools.cache
def source_logits(config):
    return judge.logits(config, source_params(config), TOKENS)


apply = jax.jit(model.apply, static_argnums=0)


def stackjax_logits(config, params, compute_dtype):
    """Returns stackjax's logits for float32 parameters."""
    typed = dataclasses.replace(config, compute_dtype=compute_dtype)
    params = jax.tree.map(np.float32, params)
    return apply(typed, params, TOKENS, POSITIONS, SEGMENTS)[..., : config.vocab_size]


def distance(logits, others):
    """Returns the largest absolute difference between two logit arrays."""
    return np.abs(logits - others).max()


def test_model_matches_transformers(config):
    params = jax.tree.map(np.float32, source_params(config))
    logits = stackjax_logits(config, params, "float32")
    expected = judge.logits(config, params, TOKENS)
    assert 0.5 < expected.std() < 2
    # Float32 rounding through three layers; logits are near 1.
    assert distance(logits, expected) < 1e-5


@pytest.mark.sample(3)
@preserving("always")
def test_always_preserving_growth_keeps_the_logits(name, config):
    logits = judge.logits(*grow_operator(name, config), TOKENS)
    assert distance(logits, source_logits(config)) < FLOAT64


@pytest.mark.sample(3)
@preserving("never")
def test_never_preserving_growth_changes_the_logits(name, config):
    logits = judge.logits(*grow_operator(name, config), TOKENS)
    assert distance(logits, source_logits(config)) > DIFFERENT


@functools.cache
def reparameterize(name, config):
    """Returns the function (params, tokens since growth) -> model parameters."""
    axes = model.logical_axes(config)

    def run(params, tokens):
        for reparameterization in OPERATORS[name].reparameterizations(config):
            params = reparameterization.model_params(params, axes, tokens)
        return params

    return jax.jit(run)


def running_params(name, config, tokens):
    """Returns the target config and the model parameters, `tokens` after growth."""
    target, params = grow_operator(name, config)
    with jax.enable_x64(True):
        running = reparameterize(name, config)(params, np.float64(tokens))
    return target, jax.tree.map(np.asarray, running)


@pytest.mark.sample(3)
@preserving("at_start")
def test_growth_with_closed_masks_keeps_the_logits(name, config):
    logits = judge.logits(*running_params(name, config, 0), TOKENS)
    assert distance(logits, source_logits(config)) < FLOAT64


@pytest.mark.sample(3)
@preserving("at_start")
def test_open_masks_keep_parameters_and_change_the_logits(name, config):
    target, params = running_params(name, config, ALL_OPEN)
    jax.tree.map(np.testing.assert_array_equal, params, grow_operator(name, config)[1])
    logits = judge.logits(target, params, TOKENS)
    assert distance(logits, source_logits(config)) > DIFFERENT


def masks_at(name, source, target, tokens):
    """Returns the mask along each axis: 1 for source entries, 0 to 1 for new entries."""
    layers, starts = MASKS[name]
    over = OPENS_OVER.get(name, 128)
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
        axis: np.where(from_source[axis], 1, np.clip((tokens - start) / over, 0, 1))
        for axis, start in starts.items()
    }


@pytest.mark.sample(3)
@preserving("at_start")
def test_masked_parameters_match_masked_activations(name, config):
    _, unmasked = grow_operator(name, config)
    for tokens in (32, 100, 200, 300):
        target, params = running_params(name, config, tokens)
        masks = masks_at(name, config, target, tokens)
        expected = judge.logits(target, unmasked, TOKENS, masks)
        assert distance(judge.logits(target, params, TOKENS), expected) < FLOAT64


@pytest.mark.sample(6)
@preserving("always", models=["gqa, tied, qk_norm"])
def test_always_preserving_growth_keeps_the_logits_in_training_dtypes(name, config):
    models = (config, source_params(config)), grow_operator(name, config)
    source, grown = (stackjax_logits(*each, "float32") for each in models)
    # Float32 rounding; logits are near 1.
    assert distance(source, grown) < 1e-5
    source, grown = (stackjax_logits(*each, "bfloat16") for each in models)
    # Bfloat16 products give each model an error against float64 of 0.01 RMS and 0.04 at most.
    # The two models round differently unless growth multiplies by powers of two.
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
    """Draws valid width ratios for a source, both integers and fractions."""
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


def preserving_growths(source):
    return width_splits(source) | width_zeros(source) | depth_zeros(source)


@st.composite
def chains(draw, source):
    first = draw(preserving_growths(source))
    return chain(first, draw(preserving_growths(first.target_config(source))))


@pytest.mark.sample(4)
@pytest.mark.parametrize("growths", [width_splits, width_zeros, depth_zeros, chains])
@hypothesis.settings(max_examples=8, deadline=None)
@hypothesis.given(data=st.data())
def test_always_preserving_growth_of_random_sizes_keeps_the_logits(growths, data):
    source = data.draw(small_models(), "source")
    growth = data.draw(growths(source), "growth")
    expected = judge.logits(source, source_params(source), TOKENS)
    assert distance(judge.logits(*grow(growth, source), TOKENS), expected) < FLOAT64
