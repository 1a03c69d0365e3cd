"""When to grow: the guideline of arXiv:2405.15319 and its refit.

d is the tokens of the small model, N the parameters of the large one, D its tokens, and
C = 6 N D its FLOPs.
"""

import dataclasses
import math

import numpy as np
import numpy.typing as npt

from stackjax.analysis.scaling import Interval, Linear, fit_linear, points, positive

FITTED_PARAMS = (0.41e9, 3e9)
"""The sizes that the guideline was fitted on, as the paper names them."""
FITTED_FLOPS = (1e20, 1.2e21)
"""The FLOPs that it was fitted on."""
SCALE_FREE = (0.1, 0.2)
"""Of D: where the optima of the paper's 1.1B models lie, for sizes far from its range."""


@dataclasses.dataclass(frozen=True)
class TimingLaw:
    """The tokens to grow after: log10 d = params log10 N + flops / log10 C + constant.

    The defaults are those of arXiv:2405.15319. With them d falls with C.
    """

    params: float = 0.88
    flops: float = 163.27
    constant: float = -5.74

    def __call__(self, params: float, flops: float) -> float:
        """Returns the tokens of the small model (d) for N parameters and C = 6 N D FLOPs."""
        log_params = math.log10(positive("params", params))
        return 10 ** (
            self.params * log_params + self.flops * _inverse_log10(flops) + self.constant
        )


GUIDELINE = TimingLaw()
"""The law that the paper gives."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Refit:
    """A timing law fitted to optima, and how well they tell its coefficients."""

    law: TimingLaw
    fit: Linear
    """Its coefficients are those of the law, in the order of its fields."""

    @property
    def intervals(self) -> dict[str, Interval]:
        """The 95 % interval of each coefficient, by the name of its field."""
        rows = np.eye(3).tolist()
        names = [field.name for field in dataclasses.fields(TimingLaw)]
        return {name: self.fit.interval(row) for name, row in zip(names, rows, strict=True)}


def refit(params: npt.ArrayLike, flops: npt.ArrayLike, tokens: npt.ArrayLike) -> Refit:
    """Returns the timing law through optima, by least squares of log10 d.

    Args:
      params: N of each optimum.
      flops: C = 6 N D of each.
      tokens: d of each, such as 10 to the optimum of a parabola.

    Raises:
      UserError: There are fewer than 4 optima, or N and C do not vary independently.
    """
    params, flops, tokens = points(4, params=params, flops=flops, tokens=tokens)
    columns = [np.log10(params), [_inverse_log10(each) for each in flops.tolist()], 1.0]
    fit = fit_linear(columns, np.log10(tokens), varied={"params": params, "flops": flops})
    return Refit(law=TimingLaw(*fit.coefficients.tolist()), fit=fit)


def outside_range(params: float, flops: float) -> list[str]:
    """Returns a sentence for each of N and C that the guideline was not fitted on."""
    checks = [
        ("N", positive("params", params), "parameters", FITTED_PARAMS),
        ("C", positive("flops", flops), "FLOPs", FITTED_FLOPS),
    ]
    warnings = []
    for name, value, unit, (low, high) in checks:
        said = f"{name} is {value:.3g} {unit},"
        if value > high:
            warnings.append(
                f"{said} {value / high:.3g} times the most that the timing law was fitted on "
                f"({high:.3g})."
            )
        elif value < low:
            warnings.append(
                f"{said} 1/{low / value:.3g} of the least that the timing law was fitted on "
                f"({low:.3g})."
            )
    return warnings


def published_factor(params: float, flops: float) -> float:
    """Returns the growth factor that appendix F of arXiv:2405.15319 fits: never advice.

    It is a curiosity, log10 g = 1.01 log10 N - 29.88 / log10 C - 7.36: it asks for 24.5 at
    the size of Llama3-8B and for 221 at that of Llama2-70B, where the paper's own advice,
    and its experiments, are a factor of 4.
    """
    log_params = math.log10(positive("params", params))
    return 10 ** (1.01 * log_params - 29.88 * _inverse_log10(flops) - 7.36)


def _inverse_log10(flops: float) -> float:
    return 1 / positive("log10 of flops", math.log10(positive("flops", flops)))
