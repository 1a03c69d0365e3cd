"""Speed-up over runs from scratch, at equal loss and at equal cost.

The speed-up in arXiv:2405.15319 is scratch's cost to reach a loss, over the grown run's cost in
all stages, minus 1. A negative speed-up means growing loses.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from stackjax.analysis.loss_curve import MonotoneCurve

CONFIDENCE = 0.95


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
    """A number with a 95 % interval."""

    value: float
    low: float | None = None
    """None if unknown, as with a single seed."""
    high: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Speedup:
    """The speed-up at a loss."""

    loss: float
    is_bound: str
    """Empty for an estimate. `>` for a lower bound and `<` for an upper bound, if a side has
    not reached the loss. `-` if neither side has, if a side starts below the loss, or if the
    cost is unknown."""
    estimate: Estimate | None
    """None if unknown."""

    @property
    def sign(self) -> int:
        """1 if growing certainly wins, -1 if it certainly loses, else 0."""
        if self.estimate is None or not self.estimate.value:
            return 0
        sign = 1 if self.estimate.value > 0 else -1
        return 0 if self.is_bound == ("<" if sign > 0 else ">") else sign


@dataclasses.dataclass(frozen=True, kw_only=True)
class AtBudget:
    """Both sides' losses at equal cost."""

    cost: float
    scratch: float | None
    """Mean loss over seeds; None if some seed has no loss at this cost."""
    grown: float | None
    gap: Estimate | None
    """The grown runs' loss minus scratch's loss."""
    speedup: Speedup | None
    """At the grown runs' loss."""


def speedup_at_loss(
    scratch: Sequence[MonotoneCurve], grown: Sequence[MonotoneCurve], loss: float
) -> Speedup:
    """Returns the speed-up at a loss, from a curve for each seed.

    Means and Welch's interval are over log cost.
    """
    costs = [[curve.cost_at(loss) for curve in side] for side in (scratch, grown)]
    unknown = any(math.isnan(curve.last_cost) for curve in (*scratch, *grown))
    if unknown or any(math.isnan(cost) for side in costs for cost in side):
        return Speedup(loss=loss, is_bound="-", estimate=None)
    is_missed = [math.inf in side for side in costs]
    if all(is_missed):
        return Speedup(loss=loss, is_bound="-", estimate=None)
    if any(is_missed):
        # A run above the loss needs more than its whole cost.
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
    """Returns both sides' losses at a cost."""
    losses = [np.array([curve.loss_at(cost) for curve in side]) for side in (scratch, grown)]
    means = [None if np.isnan(side).any() else float(side.mean()) for side in losses]
    gap = None if None in means else difference(losses[1], losses[0])
    speedup = None if means[1] is None else speedup_at_loss(scratch, grown, means[1])
    return AtBudget(cost=cost, scratch=means[0], grown=means[1], gap=gap, speedup=speedup)


def crossing(scratch: Sequence[MonotoneCurve], grown: Sequence[MonotoneCurve]) -> float | None:
    """Returns the cost beyond which the grown runs' mean loss stays lower.

    None if their loss is not lower at the end, NaN for an unknown cost.
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
    """Returns the difference between means, with Welch's interval if both have seeds."""
    value = float(np.mean(ours) - np.mean(theirs))
    if min(len(ours), len(theirs)) < 2:
        return Estimate(value=value)
    variances = [float(np.var(side, ddof=1)) / len(side) for side in (ours, theirs)]
    dofs = [len(side) - 1 for side in (ours, theirs)]
    margin = t_margin(sum(variances), welch_dof(variances, dofs))
    return Estimate(value=value, low=value - margin, high=value + margin)


def welch_dof(variances: Sequence[float], dofs: Sequence[float]) -> float:
    """Returns Welch-Satterthwaite degrees of freedom for a variance sum."""
    total = sum(variances)
    # Without any variance, every share gives the same interval.
    shares = [each / total if total > 0 else 1 / len(variances) for each in variances]
    return 1 / sum(share**2 / dof for share, dof in zip(shares, dofs, strict=True))


def t_margin(variance: float, dof: float) -> float:
    """Returns half the width of Student's 95 % interval."""
    from scipy.special import stdtrit  # slow to import, and only used here

    return float(stdtrit(dof, (1 + CONFIDENCE) / 2)) * math.sqrt(variance)


def _mean_log(costs: Sequence[float]) -> float:
    return float(np.mean(np.log(costs)))


def _mean_loss(curves: Sequence[MonotoneCurve], cost: float) -> float:
    return float(np.mean([curve.loss_at(cost) for curve in curves]))
