"""A model that grows layer by layer is the model that grows at once."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GROWTHS, MODELS, random_params

from stackjax import model
from stackjax.growth import DepthZero, Interleave, Noise, Stack, WidthSplit, WidthZero, chain

KEY = jax.random.key(0)
SOURCE = MODELS["gqa"]
LEARNED = ("learn depth", "learn width", "learn both")
OPERATORS = {name: GROWTHS[name] for name in GROWTHS if name not in LEARNED} | {
    "units of the next layer, between layers that are new": chain(
        DepthZero(2, rest="fresh"), WidthSplit(mlp=2, new_units="next_layer"), Interleave(2)
    ),
    "units of the next layer, twice": chain(
        WidthSplit(mlp=2, new_units="next_layer"),
        WidthSplit(heads=2, new_units="next_layer"),
    ),
    "fresh channels, stacked": chain(WidthZero(embed=2, mlp=2), Stack(2), DepthZero(2)),
}


def layers_of(config):
    """All layers of a model, in a tree like that of its parameters."""
    return {"layers": random_params(config)["layers"]}


def grow_layers(growth, source, key=KEY):
    """The layers of the target, each made of the layers that it needs."""
    axes = {"layers": model.logical_axes(source)["layers"]}
    table = growth.layer_sources(source)

    def fresh(config, layer):
        return jax.tree.map(lambda leaf: jnp.asarray(leaf)[layer][None], layers_of(config))

    @jax.jit
    def grow(layer, params):
        return growth.grow_layer(layer, params, axes, source, key=key, fresh=fresh)

    made = [
        grow(layer, jax.tree.map(lambda leaf: leaf[needed], layers_of(source)))  # noqa: B023
        for layer, needed in enumerate(table)
    ]
    return jax.tree.map(lambda *layers: np.concatenate(layers), *made)


@pytest.mark.parametrize("name", OPERATORS)
def test_every_layer_by_itself_is_as_it_is_among_all(name, monkeypatch):
    # What is drawn at random differs, so let it be nothing.
    monkeypatch.setattr(jax.random, "normal", lambda _, shape, *__, **___: jnp.zeros(shape))
    growth, axes = OPERATORS[name], {"layers": model.logical_axes(SOURCE)["layers"]}
    grow = functools.partial(growth.grow_params, axes=axes, source=SOURCE, fresh=layers_of)
    expected = jax.jit(grow)(layers_of(SOURCE), key=KEY)
    found = grow_layers(growth, SOURCE)
    assert len(growth.layer_sources(SOURCE)) == growth.target_config(SOURCE).num_layers
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize("name", LEARNED)
def test_what_mixes_all_layers_is_refused(name):
    with pytest.raises(ValueError, match="mixes all layers, so that none can be grown"):
        chain(GROWTHS[name], Stack(2)).layer_sources(SOURCE)


@pytest.mark.parametrize("growth", [Noise(0.2), WidthSplit(mlp=2, noise=0.3)], ids=str)
def test_layers_have_noise_of_their_own_and_copies_the_same(growth):
    found = grow_layers(growth, SOURCE)["layers"]["down"]
    plain = grow_layers(Noise(0.0) if isinstance(growth, Noise) else WidthSplit(mlp=2), SOURCE)
    noise = found - plain["layers"]["down"] * (0.8 if isinstance(growth, Noise) else 1)
    assert np.abs(noise[0] - noise[1]).max() > 0.01
    stacked = grow_layers(chain(growth, Stack(2)), SOURCE)["layers"]["down"]
    np.testing.assert_array_equal(stacked[:3], stacked[3:])
