"""Fits recover planted laws, and the intervals have the stated coverage."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import scipy.optimize
import scipy.stats

from stackjax.analysis.scaling import (
    Interval,
    Linear,
    PowerLaw,
    fit_gap,
    fit_parabola,
    fit_power_law,
    speedup,
)

DRAWS = 200
COMPUTE = np.geomspace(1e18, 1e21, 8)
TOKENS = np.geomspace(1e9, 1e11, 7)
LOG_D = np.linspace(9, 10.7, 6)

# An interval and the planted value.
Check = tuple[Interval, float]


def losses(a: float, b: float, errors: np.ndarray) -> np.ndarray:
    return a * COMPUTE**b * np.exp(errors)


def power_law(rng: np.random.Generator, noise: float) -> list[Check]:
    law = fit_power_law(COMPUTE, losses(60, -0.07, 2 * noise * rng.standard_normal(8)))
    low, high = law.intervals["a"]
    extrapolated = law.interval(1e23)
    return [
        ((math.log(low), math.log(high)), math.log(60)),
        (law.intervals["b"], -0.07),
        ((math.log(extrapolated[0]), math.log(extrapolated[1])), math.log(60 * 1e23**-0.07)),
    ]


def parabola(rng: np.random.Generator, noise: float) -> list[Check]:
    loss = 2.5 + 0.05 * (LOG_D - 10) ** 2 + noise * rng.standard_normal(6)
    return [(fit_parabola(LOG_D, loss).optimum_interval, 10)]


def gap(rng: np.random.Generator, noise: float) -> list[Check]:
    law = fit_gap(TOKENS, 0.3 - 0.02 * np.log10(TOKENS) + noise * rng.standard_normal(7))
    return [(law.intervals["p"], 0.3), (law.intervals["q"], -0.02), (law.interval(1e14), 0.02)]


def grown_speedup(rng: np.random.Generator, noise: float) -> list[Check]:
    # Grown runs have twice the error, so Welch's degrees of freedom matter.
    scratch = fit_power_law(COMPUTE, losses(60, -0.07, noise * rng.standard_normal(8)))
    grown = fit_power_law(COMPUTE, losses(55, -0.069, 2 * noise * rng.standard_normal(8)))
    found = speedup(scratch, grown, 1e23)
    assert found.low is not None and found.high is not None
    log_grown = (math.log(60 / 55) - 0.07 * math.log(1e23)) / -0.069
    interval = math.log1p(found.low), math.log1p(found.high)
    return [(interval, math.log(1e23) - log_grown)]


FITS = [power_law, parabola, gap, grown_speedup]


@pytest.mark.parametrize("fit", FITS)
def test_intervals_cover_planted_values_in_90_to_99_of_100_draws(
    fit: Callable[[np.random.Generator, float], list[Check]],
):
    rng = np.random.default_rng(0)
    draws = [fit(rng, 0.003) for _ in range(DRAWS)]
    is_covered = [[low <= truth <= high for (low, high), truth in draw] for draw in draws]
    # The coverage over 200 draws at 95 % has a standard error of 1.5 %.
    assert np.all((np.mean(is_covered, axis=0) >= 0.9) & (np.mean(is_covered, axis=0) <= 0.99))


@pytest.mark.parametrize("fit", FITS)
def test_half_the_noise_makes_intervals_half_as_wide(
    fit: Callable[[np.random.Generator, float], list[Check]],
):
    # Only the scale differs. The delta method's gradients follow the estimates and change by
    # up to 4e-4 (parabola).
    widths = [
        [high - low for (low, high), _ in fit(np.random.default_rng(1), noise)]
        for noise in (1e-5, 0.5e-5)
    ]
    assert widths[1] == pytest.approx(np.array(widths[0]) / 2, rel=2e-3)


def test_power_law_and_errors_match_scipy():
    loss = losses(60, -0.07, 0.01 * np.random.default_rng(2).standard_normal(8))
    law = fit_power_law(COMPUTE, loss)
    reference = scipy.stats.linregress(np.log(COMPUTE), np.log(loss))
    margin = scipy.stats.t.ppf(0.975, 6) * reference.stderr
    margin_a = scipy.stats.t.ppf(0.975, 6) * reference.intercept_stderr
    # Only rounding differs, amplified by logarithms over a wide range.
    assert law.b == pytest.approx(reference.slope, rel=1e-9)
    assert law.intervals["b"] == pytest.approx((law.b - margin, law.b + margin), rel=1e-9)
    assert math.log(law.a) == pytest.approx(reference.intercept, rel=1e-9)
    assert np.log(law.intervals["a"]) == pytest.approx(
        (reference.intercept - margin_a, reference.intercept + margin_a), rel=1e-9
    )


def test_parabola_and_covariance_match_polyfit():
    loss = 2.5 + 0.05 * (LOG_D - 10) ** 2 + 0.003 * np.random.default_rng(3).standard_normal(6)
    fitted = fit_parabola(LOG_D, loss)
    coefficients, covariance = np.polyfit(LOG_D, loss, 2, cov=True)
    # polyfit solves normal equations in float64; the condition number is 1e5 squared.
    assert fitted.fit.coefficients[::-1] == pytest.approx(coefficients, rel=1e-6)
    assert fitted.fit.covariance[::-1, ::-1] == pytest.approx(covariance, rel=1e-5)
    assert fitted.optimum == pytest.approx(-coefficients[1] / 2 / coefficients[0], rel=1e-6)
    assert fitted.curvature == pytest.approx(2 * coefficients[0], rel=1e-6)


def test_gap_and_covariance_match_curve_fit():
    values = 0.3 - 0.02 * np.log10(TOKENS)
    values += 0.002 * np.random.default_rng(4).standard_normal(7)
    law = fit_gap(TOKENS, values)
    best, covariance = scipy.optimize.curve_fit(
        lambda tokens, p, q: p + q * np.log10(tokens), TOKENS, values
    )
    # In curve_fit, finite differences and tolerance are about 1e-8.
    assert (law.p, law.q) == pytest.approx(best, rel=1e-5)
    assert law.fit.covariance == pytest.approx(covariance, rel=1e-5)


def test_intervals_widen_with_extrapolation():
    rng = np.random.default_rng(5)
    scratch = fit_power_law(COMPUTE, losses(60, -0.07, 0.003 * rng.standard_normal(8)))
    grown = fit_power_law(COMPUTE, losses(57, -0.07, 0.003 * rng.standard_normal(8)))
    gaps = fit_gap(TOKENS, 0.3 - 0.02 * np.log10(TOKENS) + 0.003 * rng.standard_normal(7))
    widths = []
    for times in (1, 10, 100, 1000):
        intervals = [scratch.interval(1e21 * times), gaps.interval(1e11 * times)]
        assert intervals[0][0] < scratch(1e21 * times) < intervals[0][1]
        assert intervals[1][0] < gaps(1e11 * times) < intervals[1][1]
        found = speedup(scratch, grown, 1e21 * times)
        assert found.low is not None and found.high is not None
        assert found.low < found.value < found.high
        intervals.append((found.low, found.high))
        # Losses fall with compute, so intervals are relative to the loss.
        relative = [scratch(1e21 * times), 1, 1 + found.value]
        widths.append([(b - a) / x for (a, b), x in zip(intervals, relative, strict=True)])
    assert np.all(np.diff(widths, axis=0) > 0)


def test_constant_speedup_is_recovered_at_every_compute():
    scratch = fit_power_law(COMPUTE, losses(60, -0.07, np.zeros(8)))
    grown = fit_power_law(COMPUTE, losses(60 * 1.546**-0.07, -0.07, np.zeros(8)))
    for compute in (1e18, 1e20, 1e24):
        found = speedup(scratch, grown, compute)
        # The log loss is rounded to 1e-16; the error is divided by b.
        assert (found.low, found.value, found.high) == pytest.approx([0.546] * 3, abs=1e-9)


def noisy_law(a: float, b: float, seed: int) -> PowerLaw:
    errors = 0.01 * np.random.default_rng(seed).standard_normal(8)
    return fit_power_law(COMPUTE, losses(a, b, errors))


@pytest.mark.parametrize("seed", range(5))
def test_speedup_equalizes_losses_and_its_inverse_undoes_it(seed: int):
    scratch, grown = noisy_law(60, -0.07, seed), noisy_law(50, -0.068, seed + 100)
    found = speedup(scratch, grown, 1e22).value
    reference = scipy.optimize.brentq(
        lambda x: grown(10**x) - scratch(1e22), 10, 30, xtol=1e-12
    )
    # `xtol` is the tolerance in log10 C.
    assert 1e22 / (1 + found) == pytest.approx(10**reference, rel=1e-9)
    back = speedup(grown, scratch, 1e22 / (1 + found)).value
    assert (1 + found) * (1 + back) == pytest.approx(1, rel=1e-9)


def given_law(log_a: float, b: float, covariance: np.ndarray, dof: int) -> PowerLaw:
    fit = Linear(coefficients=np.array([log_a, b]), covariance=covariance, dof=dof)
    return PowerLaw(fit)


def test_speedup_of_laws_with_equal_b_has_welchs_interval():
    rng = np.random.default_rng(6)
    samples = [rng.normal(4.1, 0.01, 4), rng.normal(4.0, 0.05, 6)]
    scratch, grown = (
        given_law(x.mean(), -0.07, np.diag([x.var(ddof=1) / len(x), 0]), len(x) - 1)
        for x in samples
    )
    reference = scipy.stats.ttest_ind(*samples, equal_var=False).confidence_interval(0.95)
    found = speedup(scratch, grown, 1e22)
    assert found.low is not None and found.high is not None
    log_ratio = np.log1p([found.low, found.high])
    # The log loss is rounded to 1e-15; the error is divided by b.
    assert log_ratio == pytest.approx(
        np.array([reference.low, reference.high]) / 0.07, rel=1e-9
    )


def test_speedup_interval_matches_numerical_derivatives():
    best = np.array([[4.1, -0.07], [4.0, -0.068]])
    root = 1e-3 * np.random.default_rng(7).standard_normal((2, 2, 2))
    covariances = root @ root.transpose(0, 2, 1)
    zeros = np.zeros((2, 2))

    def log_ratio(coefficients: np.ndarray) -> float:
        exact = [given_law(log_a, b, zeros, 6) for log_a, b in coefficients]
        found = speedup(exact[0], exact[1], 1e24)
        assert found.low == found.high == found.value, "laws without error have no interval"
        return math.log1p(found.value)

    steps = 1e-6 * np.eye(4).reshape(4, 2, 2)
    slopes = [(log_ratio(best + step) - log_ratio(best - step)) / 2e-6 for step in steps]
    gradients = np.reshape(slopes, (2, 2))
    variance = np.einsum("li,lij,lj->", gradients, covariances, gradients)
    # With 1e9 degrees of freedom, Student's t is the normal distribution.
    laws = [
        given_law(*each, covariance, 10**9)
        for each, covariance in zip(best.tolist(), covariances, strict=True)
    ]
    found = speedup(laws[0], laws[1], 1e24)
    assert found.low is not None and found.high is not None
    width = math.log1p(found.high) - math.log1p(found.low)
    # Central differences: a truncation error (1e-6 / b)^2 and rounding, 1e-15 / 1e-6.
    margin = scipy.stats.norm.ppf(0.975) * math.sqrt(variance)
    assert width == pytest.approx(2 * margin, rel=1e-6)


@pytest.mark.parametrize("optimum, outside", [(8.5, True), (9.5, False), (11.2, True)])
def test_optimum_outside_the_data_is_flagged(optimum: float, outside: bool):
    fitted = fit_parabola(LOG_D, 2.5 + 0.05 * (LOG_D - optimum) ** 2)
    # Without noise, only rounding remains, amplified by a condition number of 1e5.
    assert fitted.optimum == pytest.approx(optimum, abs=1e-8)
    assert fitted.curvature == pytest.approx(0.1, rel=1e-8)
    assert fitted.is_extrapolated == outside


def test_uninformative_points_give_an_infinite_interval():
    law = fit_power_law([1e20, 1.1e20, 1.2e20], [3, 2, 3])
    assert law.intervals["a"] == (0, math.inf)


FALLING = fit_power_law([1e18, 1e19, 1e20], [4, 3.5, 3.1])
RISING = fit_power_law([1e18, 1e19, 1e20], [3, 3.5, 3.7])

BAD = {
    "two points": (
        lambda: fit_power_law([1e18, 1e19], [3, 2]),
        ["compute", "(2,)", "at least 3", "add runs"],
    ),
    "table": (lambda: fit_gap(np.ones((3, 1)), np.ones((3, 1))), ["(3, 1)", "equal length"]),
    "lengths": (
        lambda: fit_power_law([1e18, 1e19, 1e20], [3, 2]),
        ["compute", "(3,)", "loss", "(2,)", "equal length"],
    ),
    "negative": (
        lambda: fit_power_law([1e18, -1.0, 1e20], [3, 2, 1]),
        ["compute[1]", "-1.0", "positive and finite", "fix or omit it"],
    ),
    "no loss": (
        lambda: fit_power_law([1e18, 1e19, 1e20], [3, 2, math.nan]),
        ["loss[2]", "nan", "positive and finite", "fix or omit it"],
    ),
    "no gap": (
        lambda: fit_gap([1e9, 1e10, 1e11], [0.1, math.inf, 0.1]),
        ["gap[1]", "inf", "finite", "fix or omit it"],
    ),
    "one compute": (
        lambda: fit_power_law([1e18] * 4, [3, 3.1, 2.9, 3]),
        ["compute has 1 different", "4 points", "other values of compute"],
    ),
    "one FLOP": (lambda: fit_power_law([1] * 4, [3, 3.1, 2.9, 3]), ["compute has 1"]),
    "three points": (
        lambda: fit_parabola([9, 10, 11], [3, 2, 3]),
        ["x", "(3,)", "at least 4", "add runs"],
    ),
    "two values of x": (
        lambda: fit_parabola([9, 9, 10, 10], [3, 2, 3, 2.5]),
        ["x has 2 different", "other values of x"],
    ),
    "downwards": (
        lambda: fit_parabola([9, 9.5, 10, 10.5], [2, 3, 3, 2]),
        ["curvature is -4", "from 9 to 10.5", "positive curvature", "add runs on both sides"],
    ),
    "rising": (
        lambda: speedup(FALLING, RISING, 1e21),
        ["grown", "b = 0.04", "must decrease"],
    ),
    "rising scratch": (lambda: speedup(RISING, FALLING, 1e21), ["scratch has b"]),
    "compute": (lambda: speedup(FALLING, FALLING, 0), ["compute is 0", "positive"]),
    "tokens": (lambda: fit_gap([1, 2, 3], [1, 2, 3])(-5), ["tokens is -5", "positive"]),
}


@pytest.mark.parametrize("name", BAD)
def test_invalid_points_are_refused_with_field_and_value(name: str):
    fit, words = BAD[name]
    with pytest.raises(ValueError) as error:
        fit()
    for word in words:
        assert word in str(error.value)
