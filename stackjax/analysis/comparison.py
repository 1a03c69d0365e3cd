"""Groups with equal settings, and their comparison."""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np

from stackjax.analysis.loss_curve import MonotoneCurve
from stackjax.analysis.names import COSTS
from stackjax.analysis.record import Record, check_comparable
from stackjax.analysis.settings import charges, differences, settings, uneven
from stackjax.analysis.speedup import AtBudget, Speedup, at_budget, crossing, speedup_at_loss
from stackjax.analysis.tuning import Tuned, at_best_rates
from stackjax.analysis.tuning import notes as tuning_notes
from stackjax.options import LossName
from stackjax.runtime.errors import UserError
from stackjax.runtime.numbers import short

_SHARES = (0.25, 0.5, 0.75, 1.0)
"""Default budgets, as shares."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Group:
    """Runs with equal settings but different seeds, at the best peak learning rates tried."""

    label: str
    tuned: Tuned

    @property
    def records(self) -> tuple[Record, ...]:
        """The runs."""
        return self.tuned.records

    @property
    def is_grown(self) -> bool:
        """Whether the model grows."""
        return bool(self.records[0].all_growths)

    def curves(self, loss: LossName, cost: str) -> list[MonotoneCurve]:
        """Returns each run's loss curve over a cost."""
        return [record.curve(loss).over(cost) for record in self.records]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """Grown runs against scratch."""

    grown: Group
    scratch: Group
    at_losses: Mapping[float, Mapping[str, Speedup]]
    """By loss and cost."""
    at_budgets: Mapping[str, Sequence[AtBudget]]
    """By cost."""
    crossings: Mapping[str, float | None]
    """By cost: where the grown runs become better for good. None if they are not better at the
    end, NaN for an unknown cost."""


def group(records: Sequence[Record]) -> list[Group]:
    """Returns groups with equal settings but different seeds, scratch first.

    Of trainings that differ only in peak learning rates, only the best one is returned.

    Raises:
      UserError: Losses are not comparable, a group has a seed twice, or not exactly 1 group is
        from scratch.
    """
    check_comparable(records)
    by_training: dict[str, list[Record]] = {}
    for record in records:
        by_training.setdefault(str(sorted(record.training.items())), []).append(record)
    for runs in by_training.values():
        seeds = [record.config["seed"] for record in runs]
        if len(set(seeds)) < len(seeds):
            raise UserError(
                f"{runs[0].path} and {runs[-1].path} have equal settings and equal seeds; runs "
                f"count as independent, so leave one out."
            )
    for runs in by_training.values():
        runs.sort(key=lambda record: record.config["seed"])
    trainings = at_best_rates(list(by_training.values()))
    labels = [_label(tuned.records[0]) for tuned in trainings]
    groups = [
        Group(
            label=(
                label if labels.count(label) == 1 else f"{label} ({tuned.records[0].path.name})"
            ),
            tuned=tuned,
        )
        for label, tuned in zip(labels, trainings, strict=True)
    ]
    groups.sort(key=lambda each: each.is_grown)
    from_scratch = [each for each in groups if not each.is_grown]
    if len(from_scratch) != 1 or len(groups) == 1:
        raise UserError(
            f"{len(from_scratch)} of {len(groups)} trainings are from scratch "
            f"({', '.join(each.label for each in from_scratch) or 'none'}); name exactly one, "
            f"and at least one with growth."
        )
    return groups


def _label(record: Record) -> str:
    """Returns a training's name: growths and timing."""
    before = f", from {record.config['init_from']}" if record.origin else ""
    grown = ", ".join(map(str, record.all_growths))
    if not grown:
        return f"scratch{before}"
    tokens = record.growth_tokens
    when = f" at {short(tokens[0])} tokens" if tokens else ""
    return f"{grown}{when}{before}"


def notes(groups: Sequence[Group]) -> list[str]:
    """Returns sentences about tuning, unequal settings, charges and unfinished runs."""
    said = tuning_notes({each.label: each.tuned for each in groups})
    said += differences({each.label: settings(each.records[0]) for each in groups})
    said += uneven({each.label: _spent(each) for each in groups})
    for record in (record for each in groups for record in each.records):
        said += charges(record)
        if not record.is_finished:
            said.append(f"{record.path} is unfinished: its learning rate may not have decayed.")
    return said


def _spent(each: Group) -> float:
    return float(np.mean([record.flops_6nd for record in each.records]))


def compare(
    groups: Sequence[Group],
    loss: LossName,
    *,
    losses: Sequence[float] = (),
    budgets: Sequence[float] = (),
) -> list[Comparison]:
    """Compares each grown group with the first group, scratch.

    Args:
      losses: Losses for the speed-up. The default is the highest loss among the scratch seeds
        at 25, 50, 75 and 100 % scratch FLOPs, and the grown runs' final loss.
      budgets: FLOPs (6ND) for the losses. The default is the same shares for both sides.
    """
    scratch, *grown = groups
    return [_compare(scratch, each, loss, losses, budgets) for each in grown]


def _compare(
    scratch: Group,
    grown: Group,
    loss: LossName,
    losses: Sequence[float],
    budgets: Sequence[float],
) -> Comparison:
    pairs = {cost: (scratch.curves(loss, cost), grown.curves(loss, cost)) for cost in COSTS}
    at_losses = losses or _default_losses(*pairs["flops_6nd"])
    return Comparison(
        grown=grown,
        scratch=scratch,
        at_losses={
            level: {cost: speedup_at_loss(*pair, level) for cost, pair in pairs.items()}
            for level in at_losses
        },
        at_budgets={
            cost: [at_budget(*pair, budget) for budget in _budgets(cost, pair, budgets)]
            for cost, pair in pairs.items()
        },
        crossings={cost: crossing(*pair) for cost, pair in pairs.items()},
    )


def _default_losses(
    scratch: Sequence[MonotoneCurve], grown: Sequence[MonotoneCurve]
) -> list[float]:
    """Returns losses reached by every seed."""
    spent = min(curve.last_cost for curve in scratch)
    levels = [np.max([curve.loss_at(share * spent) for curve in scratch]) for share in _SHARES]
    levels.append(np.max([curve.last_loss for curve in grown]))
    return sorted({float(level) for level in levels if not np.isnan(level)}, reverse=True)


def _budgets(
    cost: str,
    pair: tuple[Sequence[MonotoneCurve], Sequence[MonotoneCurve]],
    budgets: Sequence[float],
) -> list[float]:
    if budgets:
        return list(budgets) if cost == "flops_6nd" else []
    spent = min(curve.last_cost for side in pair for curve in side)
    if any(math.isnan(curve.last_cost) for side in pair for curve in side):
        return []
    return [share * spent for share in _SHARES]
