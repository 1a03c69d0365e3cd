"""How much less a grown run costs than one from scratch, at equal loss and at equal cost.

The speed-up of arXiv:2405.15319: what scratch has spent when it comes down to a loss, over what
the grown run has spent in all its stages, minus 1. It is negative where growing loses.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import scipy.stats

from stackjax.analysis.loss_curve import MonotoneCurve

CONFIDENCE = 0.95


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
    """A number, and its 95 % interval."""

    value: float
    low: float | None = None
    """None where it is not known, as with a single seed."""
    high: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Speedup:
    """The speed-up at a loss."""

    loss: float
    is_bound: str
    """"": the estimate; ">" or "<": only that it is more, or less, since the other side has
    not come down to the loss; "-": neither has, or one of them had before it was measured, or
    the cost is not known."""
    estimate: Estimate | None
    """None where nothing is known."""

    @property
    def sign(self) -> int:
        """1 where growing wins for certain, -1 where it loses, 0 where that is not known."""
        if self.estimate is None or not self.estimate.value:
            return 0
        sign = 1 if self.estimate.value > 0 else -1
        return 0 if self.is_bound == ("<" if sign > 0 else ">") else sign


@dataclasses.dataclass(frozen=True, kw_only=True)
class AtBudget:
    """What both sides have come down to for the same cost."""

    cost: float
    scratch: float | None
    """Mean loss over seeds; None where one of them was not measured there."""
    grown: float | None
    gap: Estimate | None
    """The grown runs' loss less that of scratch."""
    speedup: Speedup | None
    """At the loss of the grown runs."""


def speedup_at_loss(
    scratch: Sequence[MonotoneCurve], grown: Sequence[MonotoneCurve], loss: float
) -> Speedup:
    """Returns the speed-up of grown runs at a loss, each side a curve for each seed.

    Means and the Welch interval are those of the logarithm of what a run has spent.
    """
    costs = [[curve.cost_at(loss) for curve in side] for side in (scratch, grown)]
    unknown = any(math.isnan(curve.last_cost) for curve in (*scratch, *grown))
    if unknown or any(math.isnan(cost) for side in costs for cost in side):
        return Speedup(loss=loss, is_bound="-", estimate=None)
    is_missed = [math.inf in side for side in costs]
    if all(is_missed):
        return Speedup(loss=loss, is_bound="-", estimate=None)
    if any(is_missed):
        # A run that has not come down to the loss needs more than all that it has spent.
        spent = [
            [min(cost, curve.last_cost) for cost, curve in zip(side, curves, strict=True)]
            for side, curves in zip(costs, (scratch, grown), strict=True)
        ]
        bound = _mean_log(spent[0]) - _mean_log(spent[1])
        return Speedup(
            loss=loss,
            is_bound=">" if is_missed[0] else "<",
            estimate=Estimate(value=math.expm1(bound)),
        )
    ratio = difference(np.log(costs[0]), np.log(costs[1]))
    low, high = (None if x is None else math.expm1(x) for x in (ratio.low, ratio.high))
    estimate = Estimate(value=math.expm1(ratio.value), low=low, high=high)
    return Speedup(loss=loss, is_bound="", estimate=estimate)


def at_budget(
    scratch: Sequence[MonotoneCurve], grown: Sequence[MonotoneCurve], cost: float
) -> AtBudget:
    """Returns what both sides have come down to at a cost."""
    losses = [np.array([curve.loss_at(cost) for curve in side]) for side in (scratch, grown)]
    means = [None if np.isnan(side).any() else float(side.mean()) for side in losses]
    gap = None if None in means else difference(losses[1], losses[0])
    speedup = None if means[1] is None else speedup_at_loss(scratch, grown, means[1])
    return AtBudget(cost=cost, scratch=means[0], grown=means[1], gap=gap, speedup=speedup)


def crossing(scratch: Sequence[MonotoneCurve], grown: Sequence[MonotoneCurve]) -> float | None:
    """Returns the cost from which on the mean loss of the grown runs is the lower one.

    None where at the end of what both have measured it is not; NaN for an unknown cost.
    """
    curves = [*scratch, *grown]
    if any(math.isnan(curve.last_cost) for curve in curves):
        return math.nan
    start = max(curve.first_cost for curve in curves)
    stop = min(curve.last_cost for curve in curves)
    if start >= stop:
        return None
    knots = [np.exp(curve.log_costs) for curve in curves]
    costs = np.unique([start, stop, *np.clip(np.concatenate(knots), start, stop)])
    gaps = np.array([_mean_loss(grown, cost) - _mean_loss(scratch, cost) for cost in costs])
    above = np.flatnonzero(gaps >= 0)
    if len(above) == 0:
        return float(costs[0])
    last = above[-1]
    if last == len(costs) - 1:
        return None
    share = gaps[last] / (gaps[last] - gaps[last + 1])
    log_costs = np.log(costs[last : last + 2])
    return math.exp(log_costs[0] + share * (log_costs[1] - log_costs[0]))


def difference(ours: np.ndarray, theirs: np.ndarray) -> Estimate:
    """Returns the difference of two means, with Welch's interval where both have seeds."""
    value = float(np.mean(ours) - np.mean(theirs))
    if min(len(ours), len(theirs)) < 2:
        return Estimate(value=value)
    interval = scipy.stats.ttest_ind(ours, theirs, equal_var=False).confidence_interval(
        CONFIDENCE
    )
    return Estimate(value=value, low=float(interval.low), high=float(interval.high))


def _mean_log(costs: Sequence[float]) -> float:
    return float(np.mean(np.log(costs)))


def _mean_loss(curves: Sequence[MonotoneCurve], cost: float) -> float:
    return float(np.mean([curve.loss_at(cost) for curve in curves]))
