"""Mixtures give exact shares in every block, and a random but fixed order within a block."""

import itertools
import time
from fractions import Fraction

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from stackjax.data.mixture import (
    BLOCK,
    Mixture,
    block_counts,
    block_sources,
    examples_before,
)

WEIGHTS = [
    (1.0,),
    (1.0, 1.0),
    (0.0, 3.0),
    (5.0, 3.0, 2.0),
    (1e-6, 1.0, 0.0, 1e-3),
    tuple(1.0 + i for i in range(40)),
]
RAMPS = [
    Mixture(weights=(1.0, 3.0), ramp_from=(3.0, 1.0), ramp_tokens=10 * BLOCK * 8),
    Mixture(weights=(0.0, 1.0, 0.5), ramp_from=(1.0, 0.0, 0.5), ramp_tokens=77_777),
    Mixture(weights=(1.0, 1.0), ramp_from=(1.0, 0.0), ramp_tokens=1),
    Mixture(weights=(1.0, 0.3), ramp_from=(0.0, 1.0), ramp_tokens=2500 * BLOCK * 8),
]
MIXTURES = [*(Mixture(weights=weights) for weights in WEIGHTS), *RAMPS]


def counts_by_fractions(shares, block):
    """Returns a block's counts: the points i + v(block) below each edge, as exact fractions."""
    digits = f"{block:b}"[::-1]
    shift = sum((Fraction(int(d), 2 ** (i + 1)) for i, d in enumerate(digits)), Fraction(0))
    edges = [Fraction(share) * BLOCK for share in itertools.accumulate(shares)]
    edges[-1] = Fraction(BLOCK)
    points = [i + shift for i in range(BLOCK)]
    below = [sum(point < edge for point in points) for edge in edges]
    return np.diff([0, *below])


@pytest.mark.sample(3)
@pytest.mark.parametrize("mixture", MIXTURES, ids=str)
@pytest.mark.parametrize("block", [0, 1, 6])
def test_counts_are_those_of_evenly_spaced_points(mixture, block):
    part = min(1.0, block * BLOCK * 8 / mixture.ramp_tokens) if mixture.ramp_from else 1.0
    ends = np.array(mixture.weights) / sum(mixture.weights)
    starts = np.array(mixture.ramp_from or mixture.weights)
    shares = (1 - part) * starts / starts.sum() + part * ends
    found = block_counts(mixture, 8, np.array([block]))[0]
    # An edge is rounded by 2**-29 points, which moves at most a point on the edge itself.
    assert np.abs(found - counts_by_fractions(shares, block)).max() <= 1
    assert found.sum() == BLOCK


@pytest.mark.parametrize("mixture", MIXTURES, ids=str)
def test_every_block_has_exact_shares_and_remainders_even_out(mixture):
    blocks = np.arange(400)
    counts = block_counts(mixture, 8, blocks)
    shares = mixture.shares(blocks * BLOCK * 8.0)
    assert np.abs(counts - shares * BLOCK).max() < 2
    # Two edges, each with the discrepancy of 400 van der Corput points.
    assert np.abs(np.cumsum(counts - shares * BLOCK, axis=0)).max() < 8
    assert not counts[shares == 0].any()


@pytest.mark.parametrize("mixture", MIXTURES, ids=str)
def test_closed_form_equals_the_sum_over_blocks(mixture):
    counts = block_counts(mixture, 8, np.arange(3000))
    for block in (0, 1, 2, 3, 31, 32, 70, 1023, 1024, 1025, 2048, 2500, 2501, 3000):
        expected = counts[:block].sum(axis=0)
        np.testing.assert_array_equal(examples_before(mixture, 8, block), expected)


def test_distant_blocks_take_constant_time_and_keep_the_shares():
    before = examples_before(Mixture(weights=(5.0, 3.0, 2.0)), 8, 2 * 10**8)
    np.testing.assert_allclose(before / before.sum(), [0.5, 0.3, 0.2], atol=1e-9)


def test_ramp_over_a_trillion_tokens_takes_a_moment_and_has_the_mean_shares():
    num_blocks = 10**12 // (BLOCK * 512)
    mixture = Mixture(weights=(0.0, 1.0), ramp_from=(0.5, 0.5), ramp_tokens=10**12)
    before = examples_before(mixture, 512, num_blocks)
    np.testing.assert_allclose(before / before.sum(), [0.25, 0.75], atol=1e-5)
    start = time.process_time()
    for block in range(num_blocks - 20, num_blocks):
        examples_before(mixture, 512, block)
    # Without sums over spans, each of them takes half a second.
    assert time.process_time() - start < 1


@hypothesis.given(seed=st.integers(0, 2**32 - 1), block=st.integers(0, 2**20))
@hypothesis.settings(max_examples=20, deadline=None)
def test_sources_of_a_block_have_its_counts_in_a_random_order(seed, block):
    mixture = Mixture(weights=(5.0, 3.0, 2.0))
    sources = block_sources(mixture, 8, seed, block)
    counts = block_counts(mixture, 8, np.array([block]))[0]
    np.testing.assert_array_equal(np.bincount(sources, minlength=3), counts)
    # Of 4095 neighbors, 0.38 are alike by chance, with a standard deviation of 0.008.
    alike = np.mean(sources[1:] == sources[:-1])
    assert 0.34 < alike < 0.42


def test_seed_and_block_change_the_order_within_a_block():
    mixture = Mixture(weights=(1.0, 1.0))
    orders = {
        block_sources(mixture, 8, seed, block).tobytes()
        for seed in range(3)
        for block in (0, 1)
    }
    assert len(orders) == 6
