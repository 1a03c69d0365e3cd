"""RMSNorm statistics under a half-open channel mask, compared with other code.

All formulas are written out in float64: x is the residual stream before the norm,
with new channels multiplied by the mask m.
"""

import jax
import numpy as np
import pytest

from stackjax.growth.masked import Mask
from stackjax.sharding.axes import Axes

OLD, ALL = 10, 16
EPSILON = 1e-5
RNG = np.random.default_rng(0)
WRITTEN, GAIN = RNG.normal(size=(3, ALL)), RNG.uniform(0.5, 1.5, ALL)


def rms_norm(x, gain):
    return gain * x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + EPSILON)


def open_by(share):
    return np.where(np.arange(ALL) < OLD, 1.0, share)


def ours(share):
    """Returns plain RMSNorm with masked parameters."""
    mask = Mask("embed", tuple(1.0 * (np.arange(ALL) >= OLD)), False, 0, 1000)
    params = {"embedding": WRITTEN, "gain": GAIN}
    axes = {
        "embedding": Axes(reads=("vocab",), writes=("embed",)),
        "gain": Axes(writes=("embed",)),
    }
    with jax.enable_x64(True):
        run = mask.model_params(params, axes, np.float64(1000 * share))
    return rms_norm(*(np.asarray(run[name], np.float64) for name in ("embedding", "gain")))


def mean_square(x, m, power):
    """Returns the channel squares, weighted by a power of the mask, over the mask's sum."""
    return np.sum(m**power * x * x, axis=-1, keepdims=True) / np.sum(m)


def documented(share):
    m = open_by(share)
    x = m * WRITTEN
    return GAIN * m * x / np.sqrt(mean_square(x, m, 0) + EPSILON)


def prts(share):
    """Returns RMSNorm(x m) sqrt(sum(m) / D) m, as in MsgNorm."""
    m = open_by(share)
    x = m * WRITTEN
    return rms_norm(x * m, GAIN) / np.sqrt(ALL) * np.sqrt(np.sum(m)) * m


def msg(share):
    """Returns LayerNormEx without the mean, times m."""
    m = open_by(share)
    x = m * WRITTEN
    return GAIN * x / np.sqrt(mean_square(x, m, 1) + EPSILON) * m


SHARES = [0.0, 0.1, 0.5, 0.9, 1.0]


@pytest.mark.parametrize("share", SHARES)
def test_masked_norm_matches_the_documented_formula(share):
    np.testing.assert_allclose(ours(share), documented(share), rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("share", SHARES)
def test_other_code_weights_new_channels_by_a_power_of_the_mask(share):
    m = open_by(share)
    x = m * WRITTEN
    of_prts = m * GAIN * m * x / np.sqrt(mean_square(x, m, 2) + EPSILON * ALL / np.sum(m))
    np.testing.assert_allclose(prts(share), of_prts, rtol=1e-13, atol=1e-15)
    old = slice(0, OLD)
    # For m = 1 the norms differ only by their statistics.
    for other, power, epsilon in ((msg, 1, 1.0), (prts, 2, ALL / np.sum(m))):
        ratio = np.sqrt(
            (mean_square(x, m, 0) + EPSILON) / (mean_square(x, m, power) + epsilon * EPSILON)
        )
        np.testing.assert_allclose(
            other(share)[:, old], ratio * ours(share)[:, old], rtol=1e-12
        )


def test_all_agree_for_open_and_closed_masks_except_the_epsilon_of_prts():
    plain = rms_norm(WRITTEN, GAIN)
    for each in (ours, msg, prts):
        np.testing.assert_allclose(each(1.0), plain, rtol=1e-13)
    small = rms_norm(WRITTEN[:, :OLD], GAIN[:OLD])
    for each, tolerance in ((ours, 1e-13), (msg, 1e-13), (prts, ALL / OLD * EPSILON * 10)):
        np.testing.assert_allclose(each(0.0)[:, :OLD], small, rtol=tolerance)
        assert not each(0.0)[:, OLD:].any()
    assert np.abs(prts(0.0)[:, :OLD] - small).max() > 1e-7


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_norms_differ_for_half_open_masks(share):
    for other in (msg, prts):
        assert np.abs(other(share) / ours(share) - 1).max() > 1e-3
