"""CompleteP in the model: initial values, forward pass, decoding and loss."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import judge
import numpy as np
import pytest
from completep import SIZES, standard, with_completep
from conftest import KINDS, MODELS, first_microbatch, random_batch, random_params, tiny_model
from decoder import NumpyDecoder

from stackjax import model
from stackjax.growth.parametrized import fold
from stackjax.model.config import CompleteP
from stackjax.model.decoding import empty_cache, extend
from stackjax.model.transformer import unembed
from stackjax.runtime.errors import UserError

B, T = 2, 8
TOKENS = np.random.default_rng(0).integers(0, 11, (B, T), dtype=np.int32)
POSITIONS = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))


@functools.cache
def logits_of(config):
    """Returns the logits of random parameters."""
    found = jax.jit(model.apply, static_argnums=0)(
        config, random_params(config), TOKENS, POSITIONS, None
    )
    return np.asarray(found)[..., : config.vocab_size]


def test_logits_match_transformers_with_the_factors_in_the_weights(config):
    scaled = with_completep(config)
    expected = judge.logits(*standard(scaled, random_params(scaled)), TOKENS)
    # Float32 rounding through three layers; logits are near 1.
    np.testing.assert_allclose(logits_of(scaled), expected, atol=1e-5)
    assert np.abs(logits_of(scaled) - logits_of(config)).max() > 0.1


@pytest.mark.parametrize("name", ["like gpt-neox", "biases and RMSNorm", "tied"])
def test_factors_of_biases_are_in_the_standard_model(name):
    tied = dataclasses.replace(KINDS["like gpt-neox"], tie_head=True)
    config = tied if name == "tied" else KINDS[name]
    config = with_completep(dataclasses.replace(config, rotary_share=1.0))
    axes, params = model.logical_axes(config), random_params(config)
    plain, expected = standard(config, params)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-6),
        fold(params, axes, config),
        expected,
    )
    segments = np.zeros_like(TOKENS)
    logits = NumpyDecoder(plain, expected).logits(TOKENS, POSITIONS, segments)
    np.testing.assert_allclose(logits_of(config), logits[..., : config.vocab_size], atol=2e-5)


def test_learned_positions_have_no_rule_under_completep():
    with pytest.raises(UserError, match=r"model\.positions is 'learned', and model\.completep"):
        with_completep(KINDS["like gpt-2"])


def test_decoding_and_loss_have_the_factors_of_the_forward_pass(config):
    scaled, params = with_completep(config), random_params(config)

    @jax.jit
    def decode(params):
        cache, parts = empty_cache(scaled, B, T), []
        for part in (slice(0, 5), slice(5, T)):
            x, cache = extend(scaled, params, cache, TOKENS[:, part], POSITIONS[:, part])
            parts.append(unembed(scaled, params, x))
        return jnp.concatenate(parts, axis=1)

    found = np.asarray(decode(params))[..., : config.vocab_size]
    np.testing.assert_allclose(found, logits_of(scaled), atol=1e-5)

    batch = first_microbatch(random_batch())
    plain, weights = standard(scaled, params)
    loss = jax.jit(model.next_token_loss, static_argnums=0)
    found, expected = loss(scaled, params, batch), loss(plain, weights, batch)
    assert float(found.nll) == pytest.approx(float(expected.nll), rel=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_base_sizes_of_the_model_itself_change_no_operation(name):
    config = MODELS[name]
    same = with_completep(config, CompleteP.of(config))
    batch, params = first_microbatch(random_batch()), random_params(config)

    def program(config):
        def loss(params):
            return model.next_token_loss(config, params, batch).objective

        return str(jax.make_jaxpr(jax.grad(loss))(params))

    assert program(same) == program(config)

    def init(config):
        return str(jax.make_jaxpr(functools.partial(model.init, config))(jax.random.key(0)))

    assert init(same) == init(config)


LARGE = tiny_model(
    vocab_size=96,
    num_layers=6,
    embed_dim=128,
    mlp_dim=160,
    num_heads=12,
    num_kv_heads=6,
    head_dim=8,
    completep=CompleteP(
        base_layers=2,
        base_embed_dim=32,
        base_mlp_dim=80,
        base_heads=4,
        base_kv_heads=2,
        base_head_dim=4,
    ),
)
# Embedding and head as in the base model. Other matrices have the base's deviation, divided by
# the square root of the fan-in's ratio: 4 for channels, 6 for heads and 2 for units.
DEVIATIONS = {
    "reference": {
        "embedding": math.sqrt(2 / (5 * 32)),
        "head": math.sqrt(2 / (5 * 32)),
        "query": math.sqrt(2 / (5 * 32)) / 2,
        "key": math.sqrt(2 / (5 * 32)) / 2,
        "value": math.sqrt(2 / (5 * 32)) / 2,
        "gate_up": math.sqrt(2 / (5 * 32)) / 2,
        "out": math.sqrt(2 / (5 * 16)) / math.sqrt(6),
        "down": 1 / (math.sqrt(80) * 2) / math.sqrt(2),
    },
    "scaled": {
        "embedding": 0.02,
        "head": 0.02,
        "query": 0.01,
        "key": 0.01,
        "value": 0.01,
        "gate_up": 0.01,
        "out": 0.02 / math.sqrt(4) / math.sqrt(6),
        "down": 0.02 / math.sqrt(4) / math.sqrt(2),
    },
}


@pytest.mark.parametrize("init", DEVIATIONS)
def test_initial_values_have_the_documented_deviation(init):
    config = dataclasses.replace(LARGE, init=init)
    params = jax.jit(model.init, static_argnums=0)(config, jax.random.key(0))
    leaves = {**params, **params["layers"]}
    for name, deviation in DEVIATIONS[init].items():
        # Relative error of a deviation: 1 / sqrt(2 x entries).
        tolerance = 5 / math.sqrt(2 * leaves[name].size)
        assert np.std(leaves[name]) == pytest.approx(deviation, rel=tolerance), name


REFUSED = [
    ({"base_layers": 0}, r"model\.completep\.base_layers is 0"),
    ({"base_heads": 3, "base_kv_heads": 2}, r"base_heads is 3, which .* 2 does not divide"),
    ({"base_head_dim": 3}, r"base_head_dim is 3; it must be even"),
]


@pytest.mark.parametrize(("fields", "message"), REFUSED)
def test_impossible_base_sizes_are_refused(fields, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(SIZES, **fields)


@pytest.mark.parametrize("loops", [1, 3])
def test_model_that_is_its_own_base_has_no_factors(loops):
    config = tiny_model(loops=loops)
    assert not config.has_factors
    scaled = dataclasses.replace(config, completep=CompleteP.of(config))
    assert not scaled.has_factors
    assert dataclasses.replace(scaled, loops=2 * loops).has_factors
