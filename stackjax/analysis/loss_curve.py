"""Smoothed loss curves: loss at a cost, and cost at a loss."""

import dataclasses
import functools
import math
from collections.abc import Mapping

import numpy as np


@dataclasses.dataclass(frozen=True)
class Curve:
    """A run's measured losses over several costs."""

    costs: Mapping[str, np.ndarray]
    """Cumulative costs by name, with the shape of `losses`."""
    losses: np.ndarray

    def over(self, cost: str) -> "MonotoneCurve":
        """Returns the smoothed curve over a cost."""
        return _monotone(tuple(self.costs[cost].tolist()), tuple(self.losses.tolist()))


@dataclasses.dataclass(frozen=True)
class MonotoneCurve:
    """A decreasing loss curve: isotonic regression of log loss.

    The regression has no smoothing parameter. Between step means, the curve is
    linear in log loss over log cost, like a power law.
    """

    log_costs: np.ndarray
    """Mean log cost per step, increasing."""
    log_losses: np.ndarray
    """Log loss per step, decreasing."""
    last_cost: float
    """Cost at the last measurement."""

    @property
    def first_cost(self) -> float:
        """Lowest cost on the curve."""
        return math.exp(self.log_costs[0])

    @property
    def first_loss(self) -> float:
        """Highest loss on the curve."""
        return math.exp(self.log_losses[0])

    @property
    def last_loss(self) -> float:
        """Lowest loss on the curve."""
        return math.exp(self.log_losses[-1])

    def cost_at(self, loss: float) -> float:
        """Returns the cost to reach a loss.

        Infinity if the curve ends above the loss, NaN if it starts below.
        """
        if loss < self.last_loss:
            return math.inf
        if loss > self.first_loss:
            return math.nan
        found = np.interp(-math.log(loss), -self.log_losses, self.log_costs)
        return math.exp(float(found))

    def loss_at(self, cost: float) -> float:
        """Returns the loss at a cost; NaN outside the measurements."""
        if not self.first_cost <= cost <= self.last_cost:
            return math.nan
        return math.exp(float(np.interp(math.log(cost), self.log_costs, self.log_losses)))


@functools.cache
def _monotone(costs: tuple[float, ...], losses: tuple[float, ...]) -> MonotoneCurve:
    import scipy.optimize  # slow to import, and only used here

    log_costs, log_losses = np.log(costs), np.log(losses)
    fit = scipy.optimize.isotonic_regression(log_losses, increasing=False)
    starts = fit.blocks[:-1]
    widths = np.diff(fit.blocks)
    return MonotoneCurve(
        log_costs=np.add.reduceat(log_costs, starts) / widths,
        log_losses=fit.x[starts],
        last_cost=costs[-1],
    )
