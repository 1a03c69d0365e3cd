"""Decoding with a KV cache matches the forward pass without a cache."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import EXPERTS, KINDS, MODELS, random_params, tiny_model

from stackjax import model
from stackjax.model.decoding import empty_cache, extend, next_logits
from stackjax.model.transformer import unembed

B, T, CAPACITY = 2, 8, 11
# Float32 through three layers: a few roundings, for logits near 1.
TOLERANCE = 2e-5
PIECES = {"in one go": (8,), "token by token": (1,) * 8, "in uneven pieces": (3, 1, 4)}
PLACES_BT = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))
TOKENS_BT = np.random.default_rng(0).integers(0, 11, (B, T), dtype=np.int32)


@functools.cache
def expected(config):
    """Returns the logits of all tokens from a single forward pass."""
    apply = jax.jit(functools.partial(model.apply, config))
    return np.asarray(apply(random_params(config), TOKENS_BT, PLACES_BT, None))


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def logits_of(config, params, cache, tokens_BT, positions_BT):
    """Returns the logits of new tokens, and the updated cache."""
    x_BTD, cache = extend(config, params, cache, tokens_BT, positions_BT)
    return unembed(config, params, x_BTD), cache


def filled(cache):
    """Returns a cache with large values, to detect reads of unwritten slots."""
    return jax.tree.map(lambda leaf: jnp.full_like(leaf, 1e3), cache)


@pytest.mark.sample(3)
@pytest.mark.parametrize("pieces", PIECES)
def test_incremental_logits_match_the_full_forward_pass(config, pieces):
    cache = filled(empty_cache(config, B, CAPACITY))
    found, start = [], 0
    for length in PIECES[pieces]:
        piece = np.s_[:, start : start + length]
        logits_BTV, cache = logits_of(
            config, random_params(config), cache, TOKENS_BT[piece], PLACES_BT[piece]
        )
        found.append(logits_BTV)
        start += length
    np.testing.assert_allclose(np.concatenate(found, 1), expected(config), atol=TOLERANCE)


@pytest.mark.parametrize("name", [*KINDS, *EXPERTS])
def test_incremental_logits_of_layer_kinds_match_the_full_forward_pass(name):
    config = (KINDS | EXPERTS)[name]
    params, cache = random_params(config), filled(empty_cache(config, B, CAPACITY))
    found = []
    for piece in (np.s_[:, :3], np.s_[:, 3:4], np.s_[:, 4:]):
        logits_BTV, cache = logits_of(config, params, cache, TOKENS_BT[piece], PLACES_BT[piece])
        found.append(logits_BTV)
    # Embeddings that are multiplied by 4 have larger roundings.
    np.testing.assert_allclose(np.concatenate(found, 1), expected(config), atol=3 * TOLERANCE)


def test_model_without_layers_decodes():
    config = tiny_model(num_layers=0)
    params, cache = random_params(config), empty_cache(config, B, CAPACITY)
    found, _ = logits_of(config, params, cache, TOKENS_BT, PLACES_BT)
    np.testing.assert_allclose(found, expected(config), atol=TOLERANCE)


def test_rows_may_have_different_lengths_and_any_padding(config):
    params, cache = random_params(config), filled(empty_cache(config, B, CAPACITY))
    rows, lengths_B = np.arange(B), np.int32([2, 5])
    padded_BT = np.where(lengths_B[:, None] > PLACES_BT, TOKENS_BT, 7)
    logits_BTV, cache = logits_of(config, params, cache, padded_BT, PLACES_BT)
    found_BV = logits_BTV[rows, lengths_B - 1]
    for positions_B in (lengths_B, lengths_B + 1, lengths_B + 2):
        wanted_BV = expected(config)[rows, positions_B - 1]
        np.testing.assert_allclose(found_BV, wanted_BV, atol=TOLERANCE)
        tokens_B1 = TOKENS_BT[rows, positions_B][:, None]
        logits_B1V, cache = logits_of(config, params, cache, tokens_B1, positions_B[:, None])
        found_BV = logits_B1V[:, 0]


def test_next_logits_are_the_logits_at_one_place_per_row():
    config, params = MODELS["gqa"], random_params(MODELS["gqa"])

    @jax.jit
    def run(params, tokens_BT, place_B):
        cache = empty_cache(config, B, CAPACITY)
        x_BTD, _ = extend(config, params, cache, tokens_BT, PLACES_BT)
        return next_logits(config, params, x_BTD, place_B)

    logits_BV = run(params, TOKENS_BT, np.int32([6, 2]))
    np.testing.assert_allclose(logits_BV, expected(config)[[0, 1], [6, 2]], atol=TOLERANCE)
    assert np.isneginf(logits_BV[:, config.vocab_size :]).all()


def test_bfloat16_cache_gives_float32_logits_close_to_float32():
    config = dataclasses.replace(MODELS["gqa"], compute_dtype="bfloat16")
    cache = empty_cache(config, B, CAPACITY)
    params = random_params(config)
    logits_BTV, cache = logits_of(config, params, cache, TOKENS_BT, PLACES_BT)
    assert {leaf.dtype for leaf in cache} == {jnp.dtype("bfloat16")}
    assert logits_BTV.dtype == jnp.float32
    # Bfloat16 has 8 bits in each of a dozen products, for logits near 1.
    error = np.abs(logits_BTV - expected(MODELS["gqa"]))[..., : config.vocab_size]
    assert 0 < error.max() < 0.2


def test_decoding_step_updates_the_cache_in_place():
    config = tiny_model(num_layers=16)
    params = jax.eval_shape(functools.partial(model.init, config), jax.random.key(0))
    cache = jax.eval_shape(lambda: empty_cache(config, B, 4096))
    row = jax.ShapeDtypeStruct((B, 1), jnp.int32)
    memory = logits_of.lower(config, params, cache, row, row).compile().memory_analysis()
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in cache)
    assert memory.alias_size_in_bytes == size
    # More than the keys and values of one layer among sixteen.
    assert memory.temp_size_in_bytes < size / 3
