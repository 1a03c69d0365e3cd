"""The paper's growth-timing guideline: values, warnings and refits."""

import math

import numpy as np
import pytest
import scipy.optimize

from stackjax.analysis.timing import (
    FITTED_FLOPS,
    FITTED_PARAMS,
    GUIDELINE,
    SCALE_FREE,
    TimingLaw,
    outside_range,
    refit,
)

# Table 4: parameters, tokens, and growth timing in 1e9 tokens. The paper gives no C; for all
# three Llama2 rows, C = 6 N D with nominal sizes and 2T tokens reproduces the timing.
TABLE_4 = {
    "Llama3-8B": (8e9, 15e12, "6.58"),
    "Llama2-7B": (7e9, 2e12, "11.11"),
    "Llama2-13B": (13e9, 2e12, "15.84"),
    "Llama2-70B": (70e9, 2e12, "42.48"),
}

# Three sizes, each with three compute budgets.
PARAMS = np.repeat([0.41e9, 1.1e9, 3e9], 3)
FLOPS = np.tile(np.geomspace(1e20, 1.2e21, 3), 3)


def optima(noise: float, rng: np.random.Generator) -> np.ndarray:
    planted = [GUIDELINE(n, c) for n, c in zip(PARAMS, FLOPS, strict=True)]
    return planted * np.exp(noise * rng.standard_normal(9))


@pytest.mark.parametrize("name", TABLE_4)
def test_guideline_matches_table_4_with_warnings(name: str):
    params, tokens, billions = TABLE_4[name]
    assert f"{GUIDELINE(params, 6 * params * tokens) / 1e9:.2f}" == billions
    params_warning, flops_warning = outside_range(params, 6 * params * tokens)
    assert params_warning.startswith("N is") and flops_warning.startswith("C is")


def test_no_warning_inside_the_fitted_range():
    assert f"{GUIDELINE(1.1e9, 6 * 1.1e9 * 1e11) / 1e9:.1f}" == "11.4"
    assert outside_range(1.1e9, 6 * 1.1e9 * 1e11) == []
    for bounds in zip(FITTED_PARAMS, FITTED_FLOPS, strict=True):
        assert outside_range(*bounds) == []


def test_guideline_exceeds_the_tokens_of_a_small_model():
    params, tokens = 1e8, 2e9
    assert GUIDELINE(params, 6 * params * tokens) / tokens == pytest.approx(10.7, abs=0.05)
    params_warning, flops_warning = outside_range(params, 6 * params * tokens)
    assert "N is 1e+08 parameters, 1/4.1 of" in params_warning
    assert "(4.1e+08)" in params_warning
    assert "C is 1.2e+18 FLOPs, 1/83.3 of" in flops_warning
    assert "(1e+20)" in flops_warning


def test_warnings_name_value_and_ratio():
    (params_warning,) = outside_range(6e9, 1e21)
    assert "6e+09 parameters, 2 times the largest" in params_warning
    (flops_warning,) = outside_range(1e9, 1.2e24)
    assert "1.2e+24 FLOPs, 1e+03 times the largest" in flops_warning


def test_scale_free_range_includes_the_guideline_at_1b():
    assert SCALE_FREE[0] <= GUIDELINE(1.1e9, 6 * 1.1e9 * 1e11) / 1e11 <= SCALE_FREE[1]


def test_noiseless_refit_recovers_the_law():
    fitted = refit(PARAMS, FLOPS, optima(0, np.random.default_rng(0)))
    # 1 / log10 C varies by only 5 %, so the condition number is about 1e4.
    assert fitted.law.params == pytest.approx(GUIDELINE.params, rel=1e-9)
    assert fitted.law.flops == pytest.approx(GUIDELINE.flops, rel=1e-9)
    assert fitted.law.constant == pytest.approx(GUIDELINE.constant, rel=1e-9)
    assert fitted.law(2e9, 5e20) == pytest.approx(GUIDELINE(2e9, 5e20), rel=1e-9)


def test_refit_intervals_cover_the_law_in_90_to_99_of_100_draws():
    rng = np.random.default_rng(1)
    draws = [refit(PARAMS, FLOPS, optima(0.3, rng)).intervals for _ in range(200)]
    for name, (low, high) in _stack(draws).items():
        # The coverage over 200 draws at 95 % has a standard error of 1.5 %.
        held = np.mean((low <= getattr(GUIDELINE, name)) & (getattr(GUIDELINE, name) <= high))
        assert 0.9 <= held <= 0.99


def test_half_the_noise_makes_intervals_half_as_wide():
    wide, narrow = (
        refit(PARAMS, FLOPS, optima(noise, np.random.default_rng(2))).intervals
        for noise in (0.3, 0.15)
    )
    for name, (low, high) in wide.items():
        # The fit is linear in the errors of log d, so only rounding remains.
        assert narrow[name][1] - narrow[name][0] == pytest.approx((high - low) / 2, rel=1e-6)


def test_refit_and_covariance_match_curve_fit():
    # Drop the last point: on the full grid, some covariances are zero, without relative error.
    params, flops, tokens = PARAMS[:8], FLOPS[:8], optima(0.3, np.random.default_rng(3))[:8]
    fitted = refit(params, flops, tokens)
    best, covariance = scipy.optimize.curve_fit(
        lambda nc, a, b, c: a * np.log10(nc[0]) + b / np.log10(nc[1]) + c,
        np.stack([params, flops]),
        np.log10(tokens),
        p0=(0.88, 163.27, -5.74),
    )
    # curve_fit's finite differences have errors near 1e-8; the condition number is 1e4.
    law = fitted.law
    assert (law.params, law.flops, law.constant) == pytest.approx(best, rel=1e-4)
    assert fitted.fit.covariance == pytest.approx(covariance, rel=1e-4)


BAD = {
    "three optima": (
        lambda: refit([1e8, 2e8, 3e8], [1e18, 2e18, 1e19], [1e8, 1e8, 1e8]),
        ["params", "(3,)", "at least 4", "add runs"],
    ),
    "one size": (
        lambda: refit([1e8] * 4, [1e18, 2e18, 1e19, 2e19], [1e8, 2e8, 1e8, 2e8]),
        ["params has 1", "flops has 4", "4 points", "other values of params"],
    ),
    "one compute": (
        lambda: refit([1e8, 2e8, 3e8, 4e8], [1e18] * 4, [1e8, 2e8, 1e8, 2e8]),
        ["params has 4", "flops has 1", "independently, flops"],
    ),
    "no tokens": (
        lambda: refit([1e8, 2e8, 3e8, 4e8], [1e18, 2e18, 1e19, 2e19], [1e8, 0, 1e8, 2e8]),
        ["tokens[1]", "0.0", "positive and finite", "fix or omit it"],
    ),
    "one FLOP": (lambda: TimingLaw()(1e8, 1), ["log10 of flops is 0.0", "positive"]),
    "no parameters": (lambda: GUIDELINE(0, 1e20), ["params is 0", "positive"]),
    "no range": (lambda: outside_range(math.nan, 1e20), ["params is nan", "positive"]),
}


@pytest.mark.parametrize("name", BAD)
def test_invalid_fit_is_refused_with_field_and_value(name: str):
    call, words = BAD[name]
    with pytest.raises(ValueError) as error:
        call()
    for word in words:
        assert word in str(error.value)


def _stack(draws: list[dict[str, tuple[float, float]]]) -> dict[str, np.ndarray]:
    return {name: np.array([draw[name] for draw in draws]).T for name in draws[0]}
