"""Runs laid beside each other: which belong together, and what growing has come to."""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np

from stackjax.analysis.loss_curve import MonotoneCurve
from stackjax.analysis.record import COSTS, Record, check_comparable
from stackjax.analysis.settings import charges, differences, settings, uneven
from stackjax.analysis.speedup import AtBudget, Speedup, at_budget, crossing, speedup_at_loss
from stackjax.options import LossName
from stackjax.runtime.errors import UserError
from stackjax.runtime.numbers import short

_SHARES = (0.25, 0.5, 0.75, 1.0)
"""Of what scratch has spent: where the tables look if they are not told."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Group:
    """Runs that differ by their seed alone."""

    label: str
    records: tuple[Record, ...]

    @property
    def is_grown(self) -> bool:
        """Whether their model grows."""
        return bool(self.records[0].all_growths)

    def curves(self, loss: LossName, cost: str) -> list[MonotoneCurve]:
        """Returns the curve of every run over a cost."""
        return [record.curve(loss).over(cost) for record in self.records]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """What a group of grown runs has come to, beside scratch."""

    grown: Group
    scratch: Group
    at_losses: Mapping[float, Mapping[str, Speedup]]
    """By loss, and by cost."""
    at_budgets: Mapping[str, Sequence[AtBudget]]
    """By cost."""
    crossings: Mapping[str, float | None]
    """By cost: from where on the grown runs are better; None if they are not at the end,
    and NaN for a cost that is not known."""


def group(records: Sequence[Record]) -> list[Group]:
    """Returns the groups of runs that differ by their seed alone, scratch first.

    Raises:
      UserError: Their losses do not mean the same, two are the same run, or none or several
        of the groups are from scratch.
    """
    check_comparable(records)
    by_training: dict[str, list[Record]] = {}
    for record in records:
        by_training.setdefault(str(sorted(record.training.items())), []).append(record)
    for runs in by_training.values():
        seeds = [record.config["seed"] for record in runs]
        if len(set(seeds)) < len(seeds):
            raise UserError(
                f"{runs[0].path} and {runs[-1].path} are the same training from the same "
                f"seed; seeds count as independent runs, so name one of them."
            )
    labels = [_label(runs[0]) for runs in by_training.values()]
    groups = [
        Group(
            label=label if labels.count(label) == 1 else f"{label} ({runs[0].path.name})",
            records=tuple(sorted(runs, key=lambda record: record.config["seed"])),
        )
        for label, runs in zip(labels, by_training.values(), strict=True)
    ]
    groups.sort(key=lambda each: each.is_grown)
    from_scratch = [each for each in groups if not each.is_grown]
    if len(from_scratch) != 1 or len(groups) == 1:
        raise UserError(
            f"{len(from_scratch)} of the {len(groups)} trainings are from scratch "
            f"({', '.join(each.label for each in from_scratch) or 'none'}); name one that is, "
            f"and at least one that grows."
        )
    return groups


def _label(record: Record) -> str:
    """Returns a name for a training: how its model grows, and when."""
    before = f", from {record.config['init_from']}" if record.origin else ""
    grown = ", ".join(map(str, record.all_growths))
    if not grown:
        return f"scratch{before}"
    tokens = record.growth_tokens
    when = f" at {short(tokens[0])} tokens" if tokens else ""
    return f"{grown}{when}{before}"


def notes(groups: Sequence[Group]) -> list[str]:
    """Returns a sentence for everything that a reader of the numbers has to know.

    What groups are charged with, runs that have not ended, and settings that are not alike.
    """
    said = differences({each.label: settings(each.records[0]) for each in groups})
    said += uneven({each.label: _spent(each) for each in groups})
    for record in (record for each in groups for record in each.records):
        said += charges(record)
        if not record.is_finished:
            said.append(
                f"{record.path} has not finished: its learning rate may not have come down."
            )
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
    """Returns a comparison of each group of grown runs with the first group, scratch.

    Args:
      losses: Where to give the speed-up; by default what all seeds of scratch have come down
        to at a quarter, half, three quarters and all of its FLOPs, and what those of the grown
        runs have at their end.
      budgets: FLOPs (6ND) where to give the losses; by default the same shares.
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
    """Returns losses that every seed has come down to."""
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
