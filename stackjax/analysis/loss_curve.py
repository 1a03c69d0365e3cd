"""A loss over what it cost, read at any loss or at any cost."""

import dataclasses
import functools
import math
from collections.abc import Mapping

import numpy as np
import scipy.optimize


@dataclasses.dataclass(frozen=True)
class Curve:
    """The losses of one run, as they were measured, over each of its costs."""

    costs: Mapping[str, np.ndarray]
    """Cumulative, by name."""
    losses: np.ndarray

    def over(self, cost: str) -> "MonotoneCurve":
        """Returns the curve that never rises over a cost."""
        return _monotone(tuple(self.costs[cost].tolist()), tuple(self.losses.tolist()))


@dataclasses.dataclass(frozen=True)
class MonotoneCurve:
    """The closest curve to some losses that never rises: their isotonic regression.

    It smooths by as much as the noise makes necessary and has no width to choose. Between
    the means of its steps it is a straight line in log loss over log cost, as power laws are.
    """

    log_costs: np.ndarray
    """Of the means of the steps, rising."""
    log_losses: np.ndarray
    """Falling."""
    last_cost: float
    """What the last measurement had cost."""

    @property
    def first_cost(self) -> float:
        """The least cost that a loss is known at."""
        return math.exp(self.log_costs[0])

    @property
    def first_loss(self) -> float:
        """The highest loss that it shows."""
        return math.exp(self.log_losses[0])

    @property
    def last_loss(self) -> float:
        """The lowest loss that it reaches."""
        return math.exp(self.log_losses[-1])

    def cost_at(self, loss: float) -> float:
        """Returns what it costs to come down to a loss.

        Infinity where it is never reached, NaN where all measurements lie below it.
        """
        if loss < self.last_loss:
            return math.inf
        if loss > self.first_loss:
            return math.nan
        found = np.interp(-math.log(loss), -self.log_losses, self.log_costs)
        return math.exp(float(found))

    def loss_at(self, cost: float) -> float:
        """Returns the loss at a cost; NaN before the first measurement and after the last."""
        if not self.first_cost <= cost <= self.last_cost:
            return math.nan
        return math.exp(float(np.interp(math.log(cost), self.log_costs, self.log_losses)))


@functools.cache
def _monotone(costs: tuple[float, ...], losses: tuple[float, ...]) -> MonotoneCurve:
    log_costs, log_losses = np.log(costs), np.log(losses)
    fit = scipy.optimize.isotonic_regression(log_losses, increasing=False)
    starts = fit.blocks[:-1]
    widths = np.diff(fit.blocks)
    return MonotoneCurve(
        log_costs=np.add.reduceat(log_costs, starts) / widths,
        log_losses=fit.x[starts],
        last_cost=costs[-1],
    )
