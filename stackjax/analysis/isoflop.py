"""Losses for equal FLOPs over when a model grows, and by how much, and the lowest of them."""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from stackjax.analysis.comparison import Group
from stackjax.analysis.loss_curve import MonotoneCurve
from stackjax.analysis.scaling import Parabola, fit_parabola
from stackjax.analysis.timing import Refit, refit
from stackjax.growth import Growth
from stackjax.model import ModelConfig
from stackjax.model.flops import num_layer_params, num_params
from stackjax.options import LossName
from stackjax.runtime.errors import UserError

_FACTOR = re.compile(r"\((factor=)?\d+(?=[,)])")
"""The factor in the text of a growth."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
    """Runs that differ by their seed alone, and how their model grows."""

    growth: Growth
    factor: float
    """Parameters in layers of the last model over those of the first (g)."""
    tokens: int
    """Tokens before the model grows (d)."""
    curves: tuple[MonotoneCurve, ...]
    """Loss over FLOPs (6ND), all stages included."""

    def losses(self, flops: float) -> list[float]:
        """Returns the loss of each seed at a budget; none where one was not measured there."""
        found = [curve.loss_at(flops) for curve in self.curves]
        return [] if any(map(math.isnan, found)) else found


@dataclasses.dataclass(frozen=True, kw_only=True)
class Size:
    """Every cell that ends in one model, and the run from scratch of it."""

    model: ModelConfig
    scratch: tuple[MonotoneCurve, ...]
    cells: tuple[Cell, ...]

    @property
    def params(self) -> int:
        """Parameters of the model (N)."""
        return num_params(self.model)

    @property
    def budget(self) -> float:
        """The FLOPs that all of its runs have spent."""
        curves = [*self.scratch, *(curve for cell in self.cells for curve in cell.curves)]
        return min(curve.last_cost for curve in curves)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimum:
    """The lowest loss over a row of cells, for the same FLOPs."""

    size: Size
    flops: float
    fixed: str
    """What is alike in the row: a growth, or a kind of growth and its timing."""
    points: tuple[tuple[float, tuple[float, ...]], ...]
    """What varies, and the losses of the seeds."""
    parabola: Parabola | None
    """Over the log10 of what varies."""
    why_none: str
    """Why there is no parabola."""


def size_of(groups: Sequence[Group], loss: LossName) -> Size:
    """Returns the cells of groups of runs, scratch first, of those that grow once.

    Raises:
      UserError: None of them grows once.
    """
    scratch, *grown = groups
    cells = [cell for each in grown if (cell := _cell(each, loss)) is not None]
    if not cells:
        raise UserError("none of the runs grows once; when, and by how much, is then not one.")
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
    return Cell(
        growth=grown[0],
        factor=num_layer_params(record.final_model) / num_layer_params(source),
        tokens=tokens[0],
        curves=tuple(each.curves(loss, "flops_6nd")),
    )


def best_timings(size: Size, flops: float) -> list[Optimum]:
    """Returns the best d of every growth that has grown at more than one, for some FLOPs."""
    return _optima(size, flops, lambda cell: str(cell.growth), lambda cell: cell.tokens)


def best_factors(size: Size, flops: float) -> list[Optimum]:
    """Returns the best g of every kind of growth and timing that has more than one."""

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
                    f"two trainings of {size.params} parameters grow by {cell.growth} at "
                    f"{cell.tokens:,} tokens; they differ in something else, so name one."
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
        return make(parabola=None, why_none="no lowest point")
    return make(parabola=parabola, why_none="")


def refit_timing(optima: Iterable[Optimum]) -> Refit:
    """Returns the timing law through best timings, of those that lie among their points.

    Those at several budgets of the same runs are not independent, and make its intervals
    narrower than they should be.

    Args:
      optima: Of one growth.

    Raises:
      UserError: There are fewer than 4, or sizes and budgets do not vary independently.
    """
    known = [
        (each.size.params, each.flops, 10**each.parabola.optimum)
        for each in optima
        if each.parabola is not None and not each.parabola.is_extrapolated
    ]
    if len(known) < 4:
        raise UserError(
            f"{len(known)} best timings lie among those tried, and its three coefficients need "
            f"four or more, of several sizes and budgets."
        )
    return refit(*np.array(known, float).T)
