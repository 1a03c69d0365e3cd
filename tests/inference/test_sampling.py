"""Sampling matches a float64 numpy reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from stackjax.inference.sampling import candidates, sample
from stackjax.options import Sampling

V = 12
KEY = jax.random.key(5)
ROWS = st.lists(st.floats(-8, 8, width=32), min_size=V, max_size=V)
SAMPLINGS = st.builds(
    Sampling,
    temperature=st.floats(0.125, 4),
    # Each number of candidates is compiled once.
    top_k=st.sampled_from([None, 1, 2, 7, V, V + 2]),
    top_p=st.floats(0.01, 1),
)


def probabilities(logits_V, temperature):
    """Returns the softmax in float64."""
    logits_V = np.float64(logits_V) / temperature
    weights_V = np.exp(logits_V - logits_V.max())
    return weights_V / weights_V.sum()


def num_kept(logits_V, sampling, top_p):
    """Returns the number of candidates in float64."""
    sorted_V = np.sort(np.float64(logits_V))[::-1][: sampling.top_k]
    mass_V = np.cumsum(probabilities(sorted_V, sampling.temperature))
    # The smallest number with enough mass; all candidates always suffice.
    return 1 + np.count_nonzero(mass_V[:-1] < top_p)


def kept(logits_V, sampling):
    """Returns the candidates' logits and tokens."""
    logits_BV = jax.device_put(np.broadcast_to(np.float32(logits_V), (8, V)))
    logits_BK, tokens_BK = jax.device_get(candidates(logits_BV, sampling))
    is_kept_K = logits_BK[0] > -np.inf
    return logits_BK[0][is_kept_K], tokens_BK[0][is_kept_K]


@settings(max_examples=30, deadline=None)
@given(ROWS, SAMPLINGS)
def test_top_p_keeps_the_smallest_sufficient_set(logits_V, sampling):
    found_K, tokens_K = kept(logits_V, sampling)
    # Float32 sums may cross the threshold.
    fewest, most = (num_kept(logits_V, sampling, sampling.top_p + e) for e in (-1e-5, 1e-5))
    assert fewest <= len(tokens_K) <= most
    assert len(set(tokens_K.tolist())) == len(tokens_K)
    expected_K = np.sort(logits_V)[::-1][: len(tokens_K)]
    # Logits within float32 rounding may swap places.
    kept_K = np.sort(np.float64(logits_V)[tokens_K])[::-1]
    np.testing.assert_allclose(kept_K, expected_K, rtol=0, atol=1e-5)
    # Candidate logits are shifted to a maximum of 0 and divided by the temperature.
    scaled_K = (np.float64(logits_V)[tokens_K] - max(logits_V)) / sampling.temperature
    np.testing.assert_allclose(found_K, scaled_K, rtol=1e-5, atol=1e-5)


@settings(max_examples=15, deadline=None)
@given(ROWS, SAMPLINGS, st.integers(0, 2**31))
def test_sample_is_a_candidate(logits_V, sampling, seed):
    _, tokens_K = kept(logits_V, sampling)
    logits_BV = jax.device_put(np.broadcast_to(np.float32(logits_V), (8, V)))
    tokens_B = sample(logits_BV, sampling, jax.random.key(seed))
    assert set(tokens_B.tolist()) <= set(tokens_K.tolist())


# For tests with few settings.
draw = jax.jit(sample, static_argnums=1)
SETTINGS = {
    "default": Sampling(),
    "hot": Sampling(temperature=2.0),
    "cold, top 5": Sampling(temperature=0.5, top_k=5),
    "nucleus": Sampling(top_p=0.7),
    "combined": Sampling(temperature=1.5, top_k=7, top_p=0.8),
}


@pytest.mark.sample(2)
@pytest.mark.parametrize("name", SETTINGS)
def test_candidates_match_transformers_and_frequencies_match_probabilities(name):
    sampling, num_draws = SETTINGS[name], 20_000
    logits_V = np.random.default_rng(1).normal(size=V).astype(np.float32)
    warpers = [transformers.TemperatureLogitsWarper(sampling.temperature)]
    if sampling.top_k is not None:
        warpers.append(transformers.TopKLogitsWarper(sampling.top_k))
    warpers.append(transformers.TopPLogitsWarper(sampling.top_p))
    warped_1V = torch.tensor(logits_V)[None]
    for warp in warpers:
        warped_1V = warp(None, warped_1V)
    expected_V = probabilities(warped_1V[0].numpy(), 1)
    assert set(kept(logits_V, sampling)[1].tolist()) == set(np.flatnonzero(expected_V).tolist())
    logits_BV = np.broadcast_to(logits_V, (num_draws, V))
    tokens_B = draw(logits_BV, sampling, KEY)
    found_V = np.bincount(tokens_B, minlength=V) / num_draws
    # The tolerance is four standard deviations; the key is fixed.
    allowed_V = 4 * np.sqrt(expected_V * (1 - expected_V) / num_draws)
    assert (np.abs(found_V - expected_V) <= allowed_V).all()


LOGITS_BV = jax.random.normal(jax.random.key(9), (16, V))
GREEDY = {
    "temperature 0": Sampling(temperature=0),
    "a temperature near 0": Sampling(temperature=1e-30),
    "top_k 1": Sampling(top_k=1),
    "top_p near 0": Sampling(top_p=1e-6),
}


@pytest.mark.parametrize("name", GREEDY)
def test_greedy_settings_take_the_argmax(name):
    tokens_B = draw(LOGITS_BV, GREEDY[name], KEY)
    np.testing.assert_array_equal(tokens_B, np.argmax(LOGITS_BV, axis=-1))


@pytest.mark.parametrize("name", SETTINGS)
def test_tokens_without_probability_are_never_drawn(name):
    logits_BV = jnp.full((400, V), -jnp.inf).at[:, 3:6].set(0.0)
    tokens_B = draw(logits_BV, SETTINGS[name], KEY)
    drawn = set(tokens_B.tolist())
    # A nucleus of 0.7 or 0.8 contains all three tokens.
    assert drawn == {3, 4, 5}


def test_sample_does_not_depend_on_other_rows():
    tokens_B = draw(LOGITS_BV, Sampling(), KEY)
    others_BV = LOGITS_BV.at[1:].set(-LOGITS_BV[1:])
    assert draw(others_BV, Sampling(), KEY)[0] == tokens_B[0]
    assert draw(LOGITS_BV[:3], Sampling(), KEY).tolist() == tokens_B[:3].tolist()
    equal_B = draw(jnp.zeros((64, V)), Sampling(), KEY)
    assert len(set(equal_B.tolist())) > 1


@pytest.mark.parametrize(
    ("field", "value", "rule"),
    [
        ("temperature", -0.5, "at least 0"),
        ("temperature", float("nan"), "at least 0"),
        ("temperature", float("inf"), "at least 0"),
        ("top_k", 0, "at least 1"),
        ("top_p", 0.0, "more than 0 and at most 1"),
        ("top_p", 1.5, "more than 0 and at most 1"),
    ],
)
def test_invalid_sampling_value_is_refused(field, value, rule):
    with pytest.raises(ValueError, match=f"{field} is {value}; .*{rule}"):
        Sampling(**{field: value})
