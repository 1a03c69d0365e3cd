"""Power laws of loss over compute, with their uncertainty.

Every fit here is linear in its coefficients, after logarithms, so that least squares and
Student's t give exact intervals: where the law holds, and the errors of the points are
independent and alike. The points of one run's curve are not; give the ends of runs.
"""

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import scipy.stats

from stackjax.analysis.speedup import CONFIDENCE, Estimate
from stackjax.runtime.errors import UserError

Interval = tuple[float, float]
"""Lower and upper end, 95 %."""

_COLLINEAR = 1e-7
"""Of the largest singular value: its square is all that float64 can tell in a covariance."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Linear:
    """A fit by linear least squares, and what its residuals say of its error."""

    coefficients: np.ndarray
    covariance: np.ndarray
    dof: int
    """Degrees of freedom of the residuals: points less coefficients."""

    def predict(self, row: Sequence[float]) -> float:
        """Returns a weighted sum of the coefficients."""
        return float(np.dot(row, self.coefficients))

    def variance(self, row: Sequence[float]) -> float:
        """Returns the variance of a weighted sum of the coefficients."""
        return float(np.dot(row, np.dot(self.covariance, row)))

    def interval(self, row: Sequence[float]) -> Interval:
        """Returns the 95 % interval of a weighted sum of the coefficients."""
        return _around(self.predict(row), self.variance(row), self.dof)


@dataclasses.dataclass(frozen=True)
class PowerLaw:
    """The law L = a C^b of arXiv:2405.15319, figure 7, fitted as log L = log a + b log C."""

    fit: Linear

    @property
    def a(self) -> float:
        """The loss at one FLOP."""
        return _exp(self.fit.predict((1, 0)))

    @property
    def b(self) -> float:
        """The exponent, negative where compute helps."""
        return self.fit.predict((0, 1))

    @property
    def intervals(self) -> dict[str, Interval]:
        """The 95 % intervals of "a" and of "b"."""
        return {"a": _exp_interval(self.fit.interval((1, 0))), "b": self.fit.interval((0, 1))}

    def __call__(self, compute: float) -> float:
        """Returns the loss at a compute in FLOPs."""
        return _exp(self.fit.predict(_log_row(compute)))

    def interval(self, compute: float) -> Interval:
        """Returns the 95 % interval of the law at a compute; a run may lie outside it."""
        return _exp_interval(self.fit.interval(_log_row(compute)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parabola:
    """The loss over a log10, of equal FLOPs all along, and where it is the lowest."""

    fit: Linear
    """Its coefficients are those of 1, x and x^2."""
    span: tuple[float, float]
    """The lowest and the highest x of the points."""

    @property
    def optimum(self) -> float:
        """The x of the lowest loss."""
        return float(-self.fit.coefficients[1] / self.curvature)

    @property
    def optimum_interval(self) -> Interval:
        """The 95 % interval of the optimum, by the delta method.

        It is too narrow where the curvature is hardly told from 0.
        """
        gradient = (0, -1 / self.curvature, -2 * self.optimum / self.curvature)
        return _around(self.optimum, self.fit.variance(gradient), self.fit.dof)

    @property
    def curvature(self) -> float:
        """The second derivative: loss per decade squared."""
        return float(2 * self.fit.coefficients[2])

    @property
    def is_extrapolated(self) -> bool:
        """Whether the optimum lies outside the points, where it is hardly known."""
        return not self.span[0] <= self.optimum <= self.span[1]


@dataclasses.dataclass(frozen=True)
class GapLaw:
    """Scratch's loss less that of grown runs, p + q log10(tokens): the paper's figure 6."""

    fit: Linear

    @property
    def p(self) -> float:
        """The gap at one token."""
        return self.fit.predict((1, 0))

    @property
    def q(self) -> float:
        """What ten times the tokens add to the gap, negative where it closes."""
        return self.fit.predict((0, 1))

    @property
    def intervals(self) -> dict[str, Interval]:
        """The 95 % intervals of "p" and of "q"."""
        return {"p": self.fit.interval((1, 0)), "q": self.fit.interval((0, 1))}

    def __call__(self, tokens: float) -> float:
        """Returns the gap at a number of tokens."""
        return self.fit.predict((1, math.log10(positive("tokens", tokens))))

    def interval(self, tokens: float) -> Interval:
        """Returns the 95 % interval of the law at a number of tokens."""
        return self.fit.interval((1, math.log10(positive("tokens", tokens))))


def fit_power_law(compute: npt.ArrayLike, loss: npt.ArrayLike) -> PowerLaw:
    """Returns the power law through the losses of runs, each at the end of its schedule.

    Least squares of log L: errors are taken to be a share of the loss, the same for all.

    Args:
      compute: FLOPs of each run, in all its stages.

    Raises:
      UserError: There are fewer than 3 points, or numbers that are not positive and finite.
    """
    compute, loss = points(3, compute=compute, loss=loss)
    columns = [1.0, np.log(compute)]
    return PowerLaw(fit_linear(columns, np.log(loss), varied={"compute": compute}))


def fit_parabola(x: npt.ArrayLike, loss: npt.ArrayLike) -> Parabola:
    """Returns the parabola through losses at equal FLOPs.

    Args:
      x: The log10 of what was varied: tokens before growth (d), or growth factor (g).

    Raises:
      UserError: There are fewer than 4 points, or the parabola opens downwards.
    """
    x, loss = points(4, signed={"x"}, x=x, loss=loss)
    fit = fit_linear([1.0, x, x**2], loss, varied={"x": x})
    if fit.coefficients[2] <= 0:
        raise UserError(
            f"loss bends by {2 * fit.coefficients[2]:.3g} per decade squared over x from "
            f"{x.min():.4g} to {x.max():.4g}; a parabola with a lowest point must open "
            f"upwards, so add runs on both sides of the lowest loss."
        )
    return Parabola(fit=fit, span=(float(x.min()), float(x.max())))


def fit_gap(tokens: npt.ArrayLike, gap: npt.ArrayLike) -> GapLaw:
    """Returns the line through loss gaps over log10(tokens), each of its own pair of runs.

    Args:
      gap: The loss of scratch less that of the grown run; positive where growing wins.

    Raises:
      UserError: There are fewer than 3 points, or tokens that are not positive.
    """
    tokens, gap = points(3, signed={"gap"}, tokens=tokens, gap=gap)
    return GapLaw(fit_linear([1.0, np.log10(tokens)], gap, varied={"tokens": tokens}))


def speedup(scratch: PowerLaw, grown: PowerLaw, compute: float) -> Estimate:
    """Returns the speed-up that two laws foretell, with its 95 % interval.

    Grown runs reach at C' the loss that scratch has at C; the speed-up is C / C' - 1
    (arXiv:2405.15319, equation 48). Its interval is the delta method's for log(C / C'), from
    the covariances of both fits, which are taken to be of independent runs, and with the
    degrees of freedom of Welch and Satterthwaite. That the laws go on is not in it.

    Args:
      compute: FLOPs that scratch spends (C).

    Raises:
      UserError: A law does not fall with compute.
    """
    for name, law in (("scratch", scratch), ("grown", grown)):
        if law.b >= 0:
            raise UserError(
                f"{name} has b = {law.b:.3g}; a law must fall with compute (b < 0) to be "
                f"solved for a loss, so fit runs that are further apart in compute."
            )
    row = _log_row(compute)
    log_a, b = grown.fit.coefficients
    log_grown = (scratch.fit.predict(row) - log_a) / b
    variance = scratch.fit.variance(row) / b**2
    total = variance + grown.fit.variance((1, log_grown)) / b**2
    share = variance / total if total > 0 else 0.5  # laws without error have no shares
    dof = 1 / (share**2 / scratch.fit.dof + (1 - share) ** 2 / grown.fit.dof)
    log_ratio = float(row[1] - log_grown)
    low, high = _exp_interval(_around(log_ratio, total, dof))
    return Estimate(value=_exp(log_ratio) - 1, low=low - 1, high=high - 1)


def fit_linear(
    columns: Sequence[npt.ArrayLike], y: np.ndarray, *, varied: Mapping[str, np.ndarray]
) -> Linear:
    """Returns the least squares of y on columns, of which a number stands for a constant.

    Args:
      varied: What the columns were made of, to name it where they are collinear.
    """
    design = np.stack(np.broadcast_arrays(*columns), axis=-1)
    norms = np.linalg.norm(design, axis=0)
    scale = np.where(norms > 0, norms, 1.0)
    num_points, num_columns = design.shape
    if np.linalg.matrix_rank(design / scale, rtol=_COLLINEAR) < num_columns:
        taken = ", ".join(f"{name} takes {len(set(x))}" for name, x in varied.items())
        raise UserError(
            f"{taken} different values in {num_points} points, which do not tell "
            f"{num_columns} coefficients apart; add points that differ in "
            f"{' and, apart from that, in '.join(varied)}."
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
    """Returns columns of numbers as arrays of one length.

    Raises:
      UserError: They are of different lengths, fewer than `least`, or hold a number that is
        not finite, or, but for those named in `signed`, not positive.
    """
    arrays = {name: np.asarray(column, float) for name, column in columns.items()}
    shapes = {array.shape for array in arrays.values()}
    if len(shapes) > 1 or any(len(shape) != 1 or shape[0] < least for shape in shapes):
        said = ", ".join(f"{name} has shape {x.shape}" for name, x in arrays.items())
        raise UserError(
            f"{said}; this fit needs lists of one length, of at least {least} points (one more "
            f"than it has coefficients), so add runs, with a number in each list."
        )
    for name, array in arrays.items():
        for i, x in enumerate(array.tolist()):
            if name not in signed:
                positive(f"{name}[{i}]", x)
            elif not math.isfinite(x):
                raise UserError(f"{name}[{i}] is {x}; it must be finite: mend or omit it.")
    return list(arrays.values())


def positive(name: str, x: float) -> float:
    """Returns x; raises UserError where it is not positive and finite."""
    if not 0 < x < math.inf:
        raise UserError(f"{name} is {x}; it must be positive and finite: mend or omit it.")
    return x


def _log_row(compute: float) -> tuple[float, float]:
    return 1, math.log(positive("compute", compute))


def _around(centre: float, variance: float, dof: float) -> Interval:
    margin = float(scipy.stats.t.ppf((1 + CONFIDENCE) / 2, dof)) * math.sqrt(variance)
    return centre - margin, centre + margin


def _exp(x: float) -> float:
    """Returns e^x, infinite where few points leave the upper end that far away."""
    with np.errstate(over="ignore"):
        return float(np.exp(x))


def _exp_interval(interval: Interval) -> Interval:
    low, high = interval
    return _exp(low), _exp(high)
