"""The report of `isoflop`: tables, figures and numbers."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from stackjax.analysis.comparison import group, notes
from stackjax.analysis.isoflop import (
    Optimum,
    Size,
    best_factors,
    best_timings,
    refit_timing,
    size_of,
)
from stackjax.analysis.plots import optimum_figure, sign
from stackjax.analysis.reading import read_record
from stackjax.analysis.record import Record, check_comparable
from stackjax.analysis.report import write_report
from stackjax.analysis.scaling import Parabola
from stackjax.analysis.settings import provenance, trace
from stackjax.analysis.tables import LOSSES, Table, provenance_table
from stackjax.analysis.timing import GUIDELINE, Refit
from stackjax.options import IsoflopConfig, LossName
from stackjax.runtime.errors import UserError
from stackjax.runtime.numbers import short

SHARES = (0.5, 1.0)
"""Of what all runs of a size have spent: the budgets that it looks at if it is not told."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Found:
    """The best timings and factors of every size and budget, and the law of the timings."""

    records: list[Record]
    """Of all sizes that some run grows into."""
    notes: list[str]
    """In what they are not alike, and what they are charged with."""
    sizes: list[Size]
    timings: list[Optimum]
    factors: list[Optimum]
    laws: dict[str, Refit | str]
    """By growth; or why there is none."""


def write(config: IsoflopConfig) -> str:
    """Writes what was found, and returns it as Markdown.

    Raises:
      UserError: The runs do not compare.
    """
    found = find([read_record(path) for path in config.runs], config.loss, config.budgets)
    tables = [_cells_table(found, config.loss)]
    if found.timings:
        tables.append(_optima_table("after how many tokens (d)", found.timings, short))
    if found.factors:
        tables.append(_optima_table("by how much (g)", found.factors, "{:.2f}".format))
    tables.append(provenance_table(found.records))
    return write_report(
        config.output,
        "isoflop",
        title="When to grow, by how much?",
        said=[*(_law(growth, law) for growth, law in found.laws.items()), *found.notes],
        figures={
            name: sign(each, trace(found.records))
            for name, each in _figures(found, config.loss).items()
        },
        tables=tables,
        numbers=_plain(found),
    )


def find(records: Sequence[Record], loss: LossName, budgets: Sequence[float] = ()) -> Found:
    """Returns the optima of every size, smallest first, at every budget.

    Models that no run grows into, such as the small ones, are left out.

    Raises:
      UserError: Runs of a size do not compare, or none grows at all.
    """
    check_comparable(records, any_size=True)
    by_model: dict[str, list[Record]] = {}
    for record in records:
        by_model.setdefault(str(record.final_model), []).append(record)
    grown = [runs for runs in by_model.values() if any(run.all_growths for run in runs)]
    if not grown:
        raise UserError(
            f"none of the {len(records)} runs grows; name some that do, and one from scratch."
        )
    groups = [group(runs) for runs in grown]
    sizes = [size_of(each, loss) for each in groups]
    sizes.sort(key=lambda size: size.params)
    pairs = [
        (size, flops)
        for size in sizes
        for flops in budgets or [share * size.budget for share in SHARES]
    ]
    timings = [each for pair in pairs for each in best_timings(*pair)]
    factors = [each for pair in pairs for each in best_factors(*pair)]
    laws = {}
    for growth in dict.fromkeys(each.fixed for each in timings):
        try:
            laws[growth] = refit_timing(each for each in timings if each.fixed == growth)
        except UserError as error:
            laws[growth] = str(error)
    return Found(
        records=[run for runs in grown for run in runs],
        notes=[note for each in groups for note in notes(each)],
        sizes=sizes,
        timings=timings,
        factors=factors,
        laws=laws,
    )


def _law(growth: str, law: Refit | str) -> str:
    published = dataclasses.astuple(GUIDELINE)
    paper = "log10 d = {:.2f} log10 N + {:.2f} / log10 C {:+.2f}".format(*published)
    if isinstance(law, str):
        return f"{growth}: the timing law is not fitted again: {law} The paper has {paper}."
    names = ("log10 N", "1 / log10 C", "constant")
    fitted = zip(names, dataclasses.astuple(law.law), law.intervals.values(), strict=True)
    terms = [f"{name} {at:.3g} ({low:.3g} to {high:.3g})" for name, at, (low, high) in fitted]
    return f"{growth}: the timing law of these runs: {', '.join(terms)}; the paper has {paper}."


def _cells_table(found: Found, loss: LossName) -> Table:
    rows = []
    for size in found.sizes:
        scratch = [curve.loss_at(size.budget) for curve in size.scratch]
        rows.append([short(size.params), "scratch", "", *_losses(scratch, scratch)])
        for cell in sorted(size.cells, key=lambda cell: (str(cell.growth), cell.tokens)):
            losses = _losses(cell.losses(size.budget), scratch)
            rows.append([short(size.params), str(cell.growth), f"{cell.tokens:,}", *losses])
    return Table(
        title=f"{LOSSES[loss].capitalize()} for the same FLOPs (6ND)",
        note="; ".join(
            f"{short(size.params)} parameters: {size.budget:.3g} FLOPs" for size in found.sizes
        ),
        head=["parameters", "growth", "d", "mean over seeds", "less scratch", "all seeds"],
        rows=rows,
    )


def _losses(losses: Sequence[float], scratch: Sequence[float]) -> list[str]:
    if not losses:
        return ["-"] * 3  # first measured past what all have spent
    mean = float(np.mean(losses))
    every = ", ".join(f"{loss:.4f}" for loss in losses)
    return [f"{mean:.4f}", f"{mean - float(np.mean(scratch)):+.4f}", every]


def _optima_table(title: str, optima: Sequence[Optimum], show: Callable[[float], str]) -> Table:
    return Table(
        title=f"The best growth: {title}",
        note="The lowest point of a parabola over log10, with its 95 % interval.",
        head=["parameters", "FLOPs (6ND)", "of", "best", "loss there"],
        rows=[
            [short(each.size.params), f"{each.flops:.3g}", each.fixed, *_best(each, show)]
            for each in optima
        ],
    )


def _best(each: Optimum, show: Callable[[float], str]) -> list[str]:
    if each.parabola is None:
        at, losses = min(each.points, key=lambda point: np.mean(point[1]))
        return [f"{each.why_none}; of those tried {show(at)}", f"{np.mean(losses):.4f}"]
    parabola = each.parabola
    low, high = (show(end) for end in _interval(parabola))
    outside = ", outside of those tried" if parabola.is_extrapolated else ""
    loss = parabola.fit.predict((1, parabola.optimum, parabola.optimum**2))
    return [f"{show(_power(parabola.optimum))} ({low} to {high}){outside}", f"{loss:.4f}"]


def _interval(parabola: Parabola) -> list[float]:
    return [_power(end) for end in parabola.optimum_interval]


def _power(log: float) -> float:
    """Returns ten to the power of a logarithm, infinite where nothing is known of it."""
    return 10**log if log < 300 else math.inf


def _figures(found: Found, loss: LossName) -> dict[str, Figure]:
    """Returns a picture over d and one over g of each size, at the largest budget."""
    figures = {}
    for size in found.sizes:
        axes = {
            "d": (found.timings, "tokens of the small model (d)", short),
            "g": (found.factors, "growth factor (g)", "{:g}".format),
        }
        for letter, (optima, varied, show) in axes.items():
            last = max((each.flops for each in optima if each.size == size), default=0)
            rows = [each for each in optima if each.size == size and each.flops == last]
            if rows:
                points = {each.fixed: each.points for each in rows}
                scratch = [curve.loss_at(last) for curve in size.scratch]
                name = f"loss_over_{letter}-{size.params}"
                figures[name] = optimum_figure(points, scratch, loss, varied, show)
    return figures


def _plain(found: Found) -> dict[str, Any]:
    """Returns all that was found, for machines."""

    def row(each: Optimum) -> dict[str, Any]:
        parabola = each.parabola
        return {
            "params": each.size.params,
            "flops": each.flops,
            "of": each.fixed,
            "points": each.points,
            "why_none": each.why_none or None,
            "best": None if parabola is None else _power(parabola.optimum),
            "interval": None if parabola is None else _interval(parabola),
            "is_extrapolated": None if parabola is None else parabola.is_extrapolated,
        }

    laws = {
        growth: {
            name: {"value": value, "interval": law.intervals[name]}
            for name, value in dataclasses.asdict(law.law).items()
        }
        for growth, law in found.laws.items()
        if isinstance(law, Refit)
    }
    return {
        "notes": found.notes,
        "provenance": provenance(found.records),
        "runs": [
            {
                "run": str(record.path),
                "charged": dataclasses.asdict(record.charge) if record.origin else None,
            }
            for record in found.records
        ],
        "timings": [row(each) for each in found.timings],
        "factors": [row(each) for each in found.factors],
        "timing_laws": laws,
    }
