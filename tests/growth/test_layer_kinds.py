"""Growth of models with layers of several kinds, checked in float64 by a numpy decoder."""

import functools

import jax
import numpy as np
import pytest
from conftest import GROWTHS, KINDS, tiny_model
from decoder import logits_of_documents
from float64_growth import fits, grow, source_params

from stackjax import model
from stackjax.growth import (
    DepthFresh,
    DepthUpscale,
    DepthZero,
    InsertBlock,
    Interleave,
    LayerMap,
    Learn,
    Stack,
    Untie,
    WidthRandom,
    WidthSplit,
    WidthZero,
    chain,
)
from stackjax.model.layer_kind import LayerKind
from stackjax.runtime.errors import UserError

T = 8
TOKENS = np.random.default_rng(0).integers(0, 11, (1, T))
# As in test_function_preserving.
FLOAT64 = 1e-12


def logits(config, params):
    return logits_of_documents(config, params, TOKENS)


@functools.cache
def source_logits(name):
    return logits(KINDS[name], source_params(KINDS[name]))


# For some of the models, copies as in COPIES are no whole periods: these are refused.
CASES = [
    pytest.param(growth, name, id=f"{name}-{growth_name}")
    for name, config in KINDS.items()
    for growth_name, growth in GROWTHS.items()
    if growth.preserves_function != "never" and fits(growth, config)
]


@pytest.mark.sample(4)
@pytest.mark.parametrize(("growth", "name"), CASES)
def test_preserving_growth_keeps_the_logits(growth, name):
    config = KINDS[name]
    target, params = grow(growth, config, closes_masks=True)
    assert model.logical_axes(target) == model.logical_axes(config)
    assert growth.source_config(target) == config
    error = np.abs(logits(target, params) - source_logits(name)).max()
    assert error < FLOAT64


@pytest.mark.sample(4)
@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("growth_name", GROWTHS)
def test_grown_parameters_have_the_target_shapes(growth_name, name):
    growth, config = GROWTHS[growth_name], KINDS[name]
    if not fits(growth, config):
        return
    target, key = growth.target_config(config), jax.random.key(0)
    fresh = functools.partial(model.init, key=key)
    grow_shapes = functools.partial(
        growth.grow_params,
        axes=model.logical_axes(config),
        source=config,
        key=key,
        fresh=fresh,
    )
    grown = jax.eval_shape(grow_shapes, jax.eval_shape(lambda: fresh(config)))
    expected = jax.eval_shape(lambda: fresh(target))
    shapes = [jax.tree.map(lambda leaf: leaf.shape, tree) for tree in (grown, expected)]
    assert shapes[0] == shapes[1]


LOCAL, GLOBAL = LayerKind(window=3), LayerKind()
ALTERNATING = tiny_model(num_layers=4, pattern=(LOCAL, GLOBAL))
CUT = tiny_model(num_layers=3, pattern=(LOCAL, GLOBAL))

WHOLE_PERIODS = {
    "stack": (Stack(2), (0, 1, 2, 3, 0, 1, 2, 3)),
    "interleave": (Interleave(2), (0, 1, 0, 1, 2, 3, 2, 3)),
    "zero": (DepthZero(2), (0, 1, 0, 1, 2, 3, 2, 3)),
    "zero, stacked": (DepthZero(2, order="stack"), (0, 1, 2, 3, 0, 1, 2, 3)),
    "map": (LayerMap((0, 3, 2, 1)), (0, 3, 2, 1)),
    "upscale": (DepthUpscale(2), (0, 1, 2, 3)),
    "block": (InsertBlock(2), (0, 1, 0, 1, 2, 3)),
    "fresh": (DepthFresh(3), (0, 1, 2, 3, -1, -1, -1)),
}


@pytest.mark.parametrize("name", WHOLE_PERIODS)
def test_depth_growth_copies_whole_periods(name):
    growth, sources = WHOLE_PERIODS[name]
    assert growth.axis_maps(ALTERNATING)["layers"].sources == sources
    target = growth.target_config(ALTERNATING)
    assert (target.num_layers, target.pattern) == (len(sources), ALTERNATING.pattern)


# Growth, source, and the first layer whose kind would change, with its source.
REFUSED = {
    "stack": (Stack(2), CUT, 3, 0),
    "learn": (Learn(2), CUT, 3, 0),
    "map": (LayerMap((0, 1, 1, 2)), ALTERNATING, 2, 1),
    "pattern": (LayerMap("12-3*2-23"), ALTERNATING, 3, 2),
    "upscale": (DepthUpscale(1), CUT, 2, 1),
    "block": (InsertBlock(1), ALTERNATING, 2, 1),
    "zero, stacked": (DepthZero(2, order="stack"), CUT, 3, 0),
    "untie": (Untie(2), tiny_model(loops=2, pattern=(LOCAL, GLOBAL)), 3, 0),
    "chain": (chain(WidthZero(mlp=2), Stack(2)), CUT, 3, 0),
}


@pytest.mark.parametrize("name", REFUSED)
def test_growth_that_would_change_a_layers_kind_names_the_layer(name):
    growth, source, layer, copied = REFUSED[name]
    with pytest.raises(UserError, match=rf"makes layer {layer} .* from layer {copied} \("):
        growth.target_config(source)


@pytest.mark.parametrize("growth", [Interleave(2), DepthZero(2)])
def test_growth_in_place_needs_whole_periods(growth):
    with pytest.raises(UserError, match=r"whole periods .* 3 is no multiple of its 2 layers"):
        growth.target_config(CUT)


@pytest.mark.parametrize("growth", [WidthZero(heads=2), WidthRandom(heads=2, mask_tokens=8)])
def test_new_heads_are_refused_in_a_norm_over_all_heads(growth):
    with pytest.raises(UserError, match="qk_norm_over"):
        growth.target_config(KINDS["like olmo"])
    assert fits(WidthSplit(heads=2), KINDS["like olmo"])
