"""The growth-timing law in arXiv:2405.15319.

Symbols: d tokens before growth, N target parameters, D tokens from scratch, C = 6 N D FLOPs.
"""

import dataclasses
import math

import numpy as np
import numpy.typing as npt

from stackjax.analysis.scaling import Interval, Linear, fit_linear, points, positive

FITTED_PARAMS = (0.41e9, 3e9)
"""N in the paper's fit, by nominal size."""
FITTED_FLOPS = (1e20, 1.2e21)
"""C in the paper's fit."""
SCALE_FREE = (0.1, 0.2)
"""d / D with the paper's optima at 1.1B, for sizes outside the fitted range."""


@dataclasses.dataclass(frozen=True)
class TimingLaw:
    """Growth timing: log10 d = params log10 N + flops / log10 C + constant.

    The defaults are the paper's. With them, d decreases with C.
    """

    params: float = 0.88
    flops: float = 163.27
    constant: float = -5.74

    def __call__(self, params: float, flops: float) -> float:
        """Returns d for N parameters and C FLOPs."""
        log_params = math.log10(positive("params", params))
        return 10 ** (
            self.params * log_params + self.flops * _inverse_log10(flops) + self.constant
        )


GUIDELINE = TimingLaw()
"""The paper's law."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Refit:
    """A refitted timing law with uncertainty."""

    law: TimingLaw
    fit: Linear
    """Coefficients are in the law's field order."""

    @property
    def intervals(self) -> dict[str, Interval]:
        """95 % intervals by field name."""
        rows = np.eye(3).tolist()
        names = [field.name for field in dataclasses.fields(TimingLaw)]
        return {name: self.fit.interval(row) for name, row in zip(names, rows, strict=True)}


def refit(params: npt.ArrayLike, flops: npt.ArrayLike, tokens: npt.ArrayLike) -> Refit:
    """Returns the timing law fitted to optima, by least squares in log10 d.

    Args:
      params: N per optimum.
      flops: C per optimum.
      tokens: d per optimum, such as 10**parabola.optimum.

    Raises:
      UserError: There are fewer than 4 optima, or N and C do not vary independently.
    """
    params, flops, tokens = points(4, params=params, flops=flops, tokens=tokens)
    columns = [np.log10(params), [_inverse_log10(each) for each in flops.tolist()], 1.0]
    fit = fit_linear(columns, np.log10(tokens), varied={"params": params, "flops": flops})
    return Refit(law=TimingLaw(*fit.coefficients.tolist()), fit=fit)


def outside_range(params: float, flops: float) -> list[str]:
    """Returns warnings for N and C outside the paper's fitted range."""
    checks = [
        ("N", positive("params", params), "parameters", FITTED_PARAMS),
        ("C", positive("flops", flops), "FLOPs", FITTED_FLOPS),
    ]
    warnings = []
    for name, value, unit, (low, high) in checks:
        if value > high:
            relation = f"{value / high:.3g} times the largest"
        elif value < low:
            relation = f"1/{low / value:.3g} of the smallest"
        else:
            continue
        limit = high if value > high else low
        warnings.append(
            f"{name} is {value:.3g} {unit}, {relation} value in the timing law's fit "
            f"({limit:.3g})."
        )
    return warnings


def _inverse_log10(flops: float) -> float:
    return 1 / positive("log10 of flops", math.log10(positive("flops", flops)))
