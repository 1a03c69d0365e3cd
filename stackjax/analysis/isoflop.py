"""Best growth timing and growth factor at equal FLOPs."""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from stackjax.analysis.comparison import Group, group, notes
from stackjax.analysis.loss_curve import MonotoneCurve
from stackjax.analysis.record import Record, check_comparable
from stackjax.analysis.scaling import Parabola, fit_parabola
from stackjax.analysis.timing import Refit, refit
from stackjax.growth import Growth
from stackjax.model import ModelConfig
from stackjax.model.flops import num_layer_params, num_params
from stackjax.options import LossName
from stackjax.runtime.errors import UserError

SHARES = (0.5, 1.0)
"""Default budgets, as shares."""
_FACTOR = re.compile(r"\((factor=)?\d+(?=[,)])")
"""The factor in a growth's text form."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
    """Runs with equal growth and equal settings, but different seeds."""

    growth: Growth
    factor: float
    """Growth factor g: layer parameters after growth over layer parameters before."""
    tokens: int
    """Growth timing d: tokens before growth."""
    curves: tuple[MonotoneCurve, ...]
    """Loss over FLOPs (6ND) for each seed; all stages count."""

    def losses(self, flops: float) -> list[float]:
        """Returns each seed's loss at a budget; empty if some seed has no loss there."""
        found = [curve.loss_at(flops) for curve in self.curves]
        return [] if any(map(math.isnan, found)) else found


@dataclasses.dataclass(frozen=True, kw_only=True)
class Size:
    """All runs with the same final model."""

    model: ModelConfig
    scratch: tuple[MonotoneCurve, ...]
    cells: tuple[Cell, ...]

    @property
    def params(self) -> int:
        """Parameter count N."""
        return num_params(self.model)

    @property
    def budget(self) -> float:
        """FLOPs spent by every run."""
        curves = [*self.scratch, *(curve for cell in self.cells for curve in cell.curves)]
        return min(curve.last_cost for curve in curves)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimum:
    """The lowest loss over d or over g, at equal FLOPs."""

    size: Size
    flops: float
    fixed: str
    """The fixed part: a growth, or an operator with timing."""
    points: tuple[tuple[float, tuple[float, ...]], ...]
    """Pairs: d or g, and all seeds' losses."""
    parabola: Parabola | None
    """Loss over log10 d or log10 g."""
    why_none: str
    """Why there is no parabola."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optima:
    """Best timings and factors for every size and budget."""

    records: list[Record]
    """Runs whose final model is a growth target."""
    notes: list[str]
    """Differences in settings, and charges for earlier training."""
    sizes: list[Size]
    timings: list[Optimum]
    factors: list[Optimum]
    laws: dict[str, Refit | str]
    """Refitted timing law by growth, or a reason if missing."""


def find_optima(
    records: Sequence[Record], loss: LossName, budgets: Sequence[float] = ()
) -> Optima:
    """Returns the optima for every size, smallest first, at every budget.

    Models without a grown run, such as the small models, are left out.

    Raises:
      UserError: Runs with equal size are not comparable, or no run grows.
    """
    check_comparable(records, any_size=True)
    by_model: dict[str, list[Record]] = {}
    for record in records:
        by_model.setdefault(str(record.final_model), []).append(record)
    grown = [runs for runs in by_model.values() if any(run.all_growths for run in runs)]
    if not grown:
        raise UserError(
            f"none of the {len(records)} runs grows; add grown runs and a run from scratch."
        )
    groups = [group(runs) for runs in grown]
    sizes = sorted((size_of(each, loss) for each in groups), key=lambda size: size.params)
    pairs = [
        (size, flops)
        for size in sizes
        for flops in budgets or [share * size.budget for share in SHARES]
    ]
    timings = [each for pair in pairs for each in best_timings(*pair)]
    return Optima(
        records=[run for runs in grown for run in runs],
        notes=[note for each in groups for note in notes(each)],
        sizes=sizes,
        timings=timings,
        factors=[each for pair in pairs for each in best_factors(*pair)],
        laws=_timing_laws(timings),
    )


def _timing_laws(timings: Sequence[Optimum]) -> dict[str, Refit | str]:
    laws = {}
    for growth in dict.fromkeys(each.fixed for each in timings):
        try:
            laws[growth] = refit_timing(each for each in timings if each.fixed == growth)
        except UserError as error:
            laws[growth] = str(error)
    return laws


def size_of(groups: Sequence[Group], loss: LossName) -> Size:
    """Returns the cells for all groups with exactly one growth.

    Args:
      groups: Scratch first.

    Raises:
      UserError: No group grows exactly once.
    """
    scratch, *grown = groups
    cells = [cell for each in grown if (cell := _cell(each, loss)) is not None]
    if not cells:
        raise UserError("no run grows exactly once, so d and g are undefined; add such runs.")
    return Size(
        model=scratch.records[0].final_model,
        scratch=tuple(scratch.curves(loss, "flops_6nd")),
        cells=tuple(sorted(cells, key=lambda cell: (cell.tokens, cell.factor))),
    )


def _cell(each: Group, loss: LossName) -> Cell | None:
    record = each.records[0]
    grown, tokens = record.all_growths, record.growth_tokens
    if len(grown) != 1 or not tokens:
        return None
    source = grown[0].source_config(record.final_model)
    if not source.num_layers:
        return None  # g is infinite
    return Cell(
        growth=grown[0],
        factor=num_layer_params(record.final_model) / num_layer_params(source),
        tokens=tokens[0],
        curves=tuple(each.curves(loss, "flops_6nd")),
    )


def best_timings(size: Size, flops: float) -> list[Optimum]:
    """Returns the best d at a budget, for every growth with several timings."""
    return _optima(size, flops, lambda cell: str(cell.growth), lambda cell: cell.tokens)


def best_factors(size: Size, flops: float) -> list[Optimum]:
    """Returns the best g at a budget, for every operator and timing with several factors."""

    def kind(cell: Cell) -> str:
        return f"{_FACTOR.sub('(g', str(cell.growth))} at {cell.tokens:,} tokens"

    return _optima(size, flops, kind, lambda cell: cell.factor)


def _optima(
    size: Size, flops: float, fixed: Callable[[Cell], str], varied: Callable[[Cell], float]
) -> list[Optimum]:
    rows: dict[str, dict[float, tuple[float, ...]]] = {}
    for cell in size.cells:
        if losses := cell.losses(flops):
            row = rows.setdefault(fixed(cell), {})
            if varied(cell) in row:
                raise UserError(
                    f"two trainings with {size.params} parameters have growth {cell.growth} at "
                    f"{cell.tokens:,} tokens but other settings; leave one out."
                )
            row[varied(cell)] = tuple(losses)
    return [
        _optimum(size, flops, name, sorted(row.items()))
        for name, row in rows.items()
        if len(row) > 1
    ]


def _optimum(
    size: Size, flops: float, fixed: str, points: Sequence[tuple[float, tuple[float, ...]]]
) -> Optimum:
    make = functools.partial(Optimum, size=size, flops=flops, fixed=fixed, points=tuple(points))
    x = [math.log10(at) for at, losses in points for _ in losses]
    if len(x) < 4 or len(points) < 3:
        return make(parabola=None, why_none="too few runs for a parabola")
    try:
        parabola = fit_parabola(x, [loss for _, losses in points for loss in losses])
    except UserError:
        return make(parabola=None, why_none="no minimum")
    return make(parabola=parabola, why_none="")


def refit_timing(optima: Iterable[Optimum]) -> Refit:
    """Returns the timing law fitted to the best timings inside the tested range.

    Optima at several budgets share runs. They are not independent, so the intervals are too
    narrow.

    Args:
      optima: Best timings for the same growth.

    Raises:
      UserError: There are fewer than 4 optima, or N and C do not vary independently.
    """
    known = [
        (each.size.params, each.flops, 10**each.parabola.optimum)
        for each in optima
        if each.parabola is not None and not each.parabola.is_extrapolated
    ]
    if len(known) < 4:
        raise UserError(
            f"{len(known)} best timings are inside the tested range, but a fit with three "
            f"coefficients needs 4; add sizes or budgets."
        )
    return refit(*np.array(known, float).T)
