"""Scaling laws with uncertainty.

All fits are linear in their coefficients after logarithms. Least squares and Student's t
therefore give exact intervals, provided the law holds and errors are independent with equal
variance. Points on the same run's curve are dependent, so pass final losses.
"""

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from stackjax.analysis.speedup import Estimate, t_margin, welch_dof
from stackjax.runtime.errors import UserError

Interval = tuple[float, float]
"""A 95 % interval, as (low, high)."""

_COLLINEAR = 1e-7
"""Smallest accepted singular-value ratio; the square is near float64 resolution."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Linear:
    """A least-squares fit with error estimates."""

    coefficients: np.ndarray
    covariance: np.ndarray
    dof: int
    """Residual degrees of freedom: points minus coefficients."""

    def predict(self, row: Sequence[float]) -> float:
        """Returns a weighted coefficient sum."""
        return float(np.dot(row, self.coefficients))

    def variance(self, row: Sequence[float]) -> float:
        """Returns the variance for a weighted coefficient sum."""
        return float(np.dot(row, np.dot(self.covariance, row)))

    def interval(self, row: Sequence[float]) -> Interval:
        """Returns the 95 % interval for a weighted coefficient sum."""
        return _around(self.predict(row), self.variance(row), self.dof)


@dataclasses.dataclass(frozen=True)
class PowerLaw:
    """The law L = a C^b (arXiv:2405.15319, figure 7), fitted as log L = log a + b log C."""

    fit: Linear

    @property
    def a(self) -> float:
        """Loss at 1 FLOP."""
        return _exp(self.fit.predict((1, 0)))

    @property
    def b(self) -> float:
        """Exponent, negative if compute helps."""
        return self.fit.predict((0, 1))

    @property
    def intervals(self) -> dict[str, Interval]:
        """95 % intervals for `a` and `b`."""
        return {"a": _exp_interval(self.fit.interval((1, 0))), "b": self.fit.interval((0, 1))}

    def __call__(self, compute: float) -> float:
        """Returns the loss at a compute budget in FLOPs."""
        return _exp(self.fit.predict(_log_row(compute)))

    def interval(self, compute: float) -> Interval:
        """Returns the law's 95 % interval at a compute budget; single runs may lie outside."""
        return _exp_interval(self.fit.interval(_log_row(compute)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parabola:
    """Loss over log10 d or log10 g, at equal FLOPs."""

    fit: Linear
    """Coefficients for 1, x and x^2."""
    span: tuple[float, float]
    """Data range."""

    @property
    def optimum(self) -> float:
        """x at the lowest loss."""
        return float(-self.fit.coefficients[1] / self.curvature)

    @property
    def optimum_interval(self) -> Interval:
        """95 % interval for the optimum, by the delta method.

        The interval is too narrow if the curvature is close to 0.
        """
        gradient = (0, -1 / self.curvature, -2 * self.optimum / self.curvature)
        return _around(self.optimum, self.fit.variance(gradient), self.fit.dof)

    @property
    def curvature(self) -> float:
        """Second derivative: loss per decade squared."""
        return float(2 * self.fit.coefficients[2])

    @property
    def is_extrapolated(self) -> bool:
        """Is the optimum outside the data, and thus unreliable?"""
        return not self.span[0] <= self.optimum <= self.span[1]


@dataclasses.dataclass(frozen=True)
class GapLaw:
    """Scratch's loss minus grown loss, p + q log10(tokens) (arXiv:2405.15319, figure 6)."""

    fit: Linear

    @property
    def p(self) -> float:
        """Gap at 1 token."""
        return self.fit.predict((1, 0))

    @property
    def q(self) -> float:
        """Change per tenfold increase in tokens, negative if the gap closes."""
        return self.fit.predict((0, 1))

    @property
    def intervals(self) -> dict[str, Interval]:
        """95 % intervals for `p` and `q`."""
        return {"p": self.fit.interval((1, 0)), "q": self.fit.interval((0, 1))}

    def __call__(self, tokens: float) -> float:
        """Returns the gap after some tokens."""
        return self.fit.predict((1, math.log10(positive("tokens", tokens))))

    def interval(self, tokens: float) -> Interval:
        """Returns the law's 95 % interval after some tokens."""
        return self.fit.interval((1, math.log10(positive("tokens", tokens))))


def fit_power_law(compute: npt.ArrayLike, loss: npt.ArrayLike) -> PowerLaw:
    """Returns the power law fitted to final losses, by least squares in log L.

    Args:
      compute: FLOPs per run, in all stages.

    Raises:
      UserError: There are fewer than 3 points, or a number is not positive and finite.
    """
    compute, loss = points(3, compute=compute, loss=loss)
    columns = [1.0, np.log(compute)]
    return PowerLaw(fit_linear(columns, np.log(loss), varied={"compute": compute}))


def fit_parabola(x: npt.ArrayLike, loss: npt.ArrayLike) -> Parabola:
    """Returns the parabola fitted to losses at equal FLOPs.

    Args:
      x: log10 d or log10 g.

    Raises:
      UserError: There are fewer than 4 points, or the parabola has no minimum.
    """
    x, loss = points(4, signed={"x"}, x=x, loss=loss)
    fit = fit_linear([1.0, x, x**2], loss, varied={"x": x})
    if fit.coefficients[2] <= 0:
        raise UserError(
            f"the curvature is {2 * fit.coefficients[2]:.3g} per decade squared for x from "
            f"{x.min():.4g} to {x.max():.4g}; a minimum needs a positive curvature, so add "
            f"runs on both sides of the lowest loss."
        )
    return Parabola(fit=fit, span=(float(x.min()), float(x.max())))


def fit_gap(tokens: npt.ArrayLike, gap: npt.ArrayLike) -> GapLaw:
    """Returns the line fitted to independent loss gaps over log10(tokens).

    Args:
      gap: Scratch's loss minus the grown run's loss; positive if growing wins.

    Raises:
      UserError: There are fewer than 3 points, or a token count is not positive.
    """
    tokens, gap = points(3, signed={"gap"}, tokens=tokens, gap=gap)
    return GapLaw(fit_linear([1.0, np.log10(tokens)], gap, varied={"tokens": tokens}))


def speedup(scratch: PowerLaw, grown: PowerLaw, compute: float) -> Estimate:
    """Returns the speed-up predicted by two laws, with a 95 % interval.

    If grown runs at C' have scratch's loss at C, the speed-up is C / C' - 1
    (arXiv:2405.15319, equation 48). The interval uses the delta method for log(C / C') and
    Welch-Satterthwaite degrees of freedom. It assumes independent runs, and laws that hold
    beyond the data.

    Args:
      compute: Scratch's FLOPs (C).

    Raises:
      UserError: A law does not decrease with compute.
    """
    for name, law in (("scratch", scratch), ("grown", grown)):
        if law.b >= 0:
            raise UserError(
                f"{name} has b = {law.b:.3g}, but the loss must decrease with compute (b < 0); "
                f"fit runs over a wider range of compute."
            )
    row = _log_row(compute)
    log_a, b = grown.fit.coefficients
    log_grown = (scratch.fit.predict(row) - log_a) / b
    variance = scratch.fit.variance(row) / b**2
    variances = variance, grown.fit.variance((1, log_grown)) / b**2
    dof = welch_dof(variances, (scratch.fit.dof, grown.fit.dof))
    log_ratio = float(row[1] - log_grown)
    low, high = _exp_interval(_around(log_ratio, sum(variances), dof))
    return Estimate(value=_exp(log_ratio) - 1, low=low - 1, high=high - 1)


def fit_linear(
    columns: Sequence[npt.ArrayLike], y: np.ndarray, *, varied: Mapping[str, np.ndarray]
) -> Linear:
    """Returns the least-squares fit of y on columns; a column may be a constant.

    Args:
      varied: Inputs by name, for the error message about collinear columns.
    """
    design = np.stack(np.broadcast_arrays(*columns), axis=-1)
    norms = np.linalg.norm(design, axis=0)
    scale = np.where(norms > 0, norms, 1.0)
    num_points, num_columns = design.shape
    if np.linalg.matrix_rank(design / scale, rtol=_COLLINEAR) < num_columns:
        taken = ", ".join(f"{name} has {len(set(x))}" for name, x in varied.items())
        raise UserError(
            f"{taken} different values in {num_points} points, too few to identify "
            f"{num_columns} coefficients; add points with other values of "
            f"{' and, independently, '.join(varied)}."
        )
    inverse = np.linalg.pinv(design / scale) / scale[:, None]
    coefficients = inverse @ y
    residuals = y - design @ coefficients
    dof = num_points - num_columns
    covariance = residuals @ residuals / dof * (inverse @ inverse.T)
    return Linear(coefficients=coefficients, covariance=covariance, dof=dof)


def points(
    least: int, *, signed: Collection[str] = (), **columns: npt.ArrayLike
) -> list[np.ndarray]:
    """Returns columns as arrays with equal length.

    Args:
      least: Smallest accepted length.
      signed: Columns with finite numbers; other columns must be positive.

    Raises:
      UserError: Lengths differ or are too small, or a number is out of range.
    """
    arrays = {name: np.asarray(column, float) for name, column in columns.items()}
    shapes = {array.shape for array in arrays.values()}
    if len(shapes) > 1 or any(len(shape) != 1 or shape[0] < least for shape in shapes):
        said = ", ".join(f"{name} has shape {x.shape}" for name, x in arrays.items())
        raise UserError(
            f"{said}; this fit needs lists of equal length with at least {least} points (one "
            f"more than coefficients), so add runs."
        )
    for name, array in arrays.items():
        for i, x in enumerate(array.tolist()):
            if name not in signed:
                positive(f"{name}[{i}]", x)
            elif not math.isfinite(x):
                raise UserError(f"{name}[{i}] is {x}; it must be finite: fix or omit it.")
    return list(arrays.values())


def positive(name: str, x: float) -> float:
    """Returns x; UserError if x is not positive and finite."""
    if not 0 < x < math.inf:
        raise UserError(f"{name} is {x}; it must be positive and finite: fix or omit it.")
    return x


def _log_row(compute: float) -> tuple[float, float]:
    return 1, math.log(positive("compute", compute))


def _around(center: float, variance: float, dof: float) -> Interval:
    margin = t_margin(variance, dof)
    return center - margin, center + margin


def _exp(x: float) -> float:
    """Returns e^x, or infinity if that overflows."""
    with np.errstate(over="ignore"):
        return float(np.exp(x))


def _exp_interval(interval: Interval) -> Interval:
    low, high = interval
    return _exp(low), _exp(high)
