"""Reports on the best growth timing and growth factor."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from stackjax.analysis.isoflop import Optima, Optimum, find_optima
from stackjax.analysis.names import LOSSES
from stackjax.analysis.plots import optimum_figure, sign
from stackjax.analysis.reading import read_record
from stackjax.analysis.report import write_report
from stackjax.analysis.scaling import Parabola
from stackjax.analysis.settings import provenance, trace
from stackjax.analysis.tables import Table, provenance_table
from stackjax.analysis.timing import GUIDELINE, Refit
from stackjax.files.output import check_output_directory
from stackjax.options import IsoflopConfig, LossName
from stackjax.runtime.numbers import short


def write(config: IsoflopConfig) -> str:
    """Writes the optima, and returns them as Markdown.

    Raises:
      UserError: The runs are not comparable, or the output directory is not writable.
    """
    check_output_directory("--output", config.output)
    loss, records = config.loss, [read_record(path) for path in config.runs]
    optima = find_optima(records, loss, config.budgets)
    tables = [_cells_table(optima, loss)]
    if optima.timings:
        tables.append(_optima_table("timing d in tokens", optima.timings, short))
    if optima.factors:
        tables.append(_optima_table("factor g", optima.factors, "{:.2f}".format))
    tables.append(provenance_table(optima.records))
    return write_report(
        config.output,
        "isoflop",
        title="When to grow, by how much?",
        said=[*(_law_text(*item) for item in optima.laws.items()), *optima.notes],
        figures={
            name: sign(figure, trace(optima.records))
            for name, figure in _figures(optima, loss).items()
        },
        tables=tables,
        numbers=_numbers(optima),
    )


def _law_text(growth: str, law: Refit | str) -> str:
    published = dataclasses.astuple(GUIDELINE)
    paper = "log10 d = {:.2f} log10 N + {:.2f} / log10 C {:+.2f}".format(*published)
    if isinstance(law, str):
        return f"{growth}: no refit of the timing law: {law} The paper has {paper}."
    names = ("log10 N", "1 / log10 C", "constant")
    fitted = zip(names, dataclasses.astuple(law.law), law.intervals.values(), strict=True)
    terms = [f"{name} {at:.3g} ({low:.3g} to {high:.3g})" for name, at, (low, high) in fitted]
    return f"{growth}: timing law refitted to these runs: {', '.join(terms)}; paper: {paper}."


def _cells_table(optima: Optima, loss: LossName) -> Table:
    rows = []
    for size in optima.sizes:
        scratch = [curve.loss_at(size.budget) for curve in size.scratch]
        rows.append([short(size.params), "scratch", "", *_losses(scratch, scratch)])
        for cell in sorted(size.cells, key=lambda cell: (str(cell.growth), cell.tokens)):
            losses = _losses(cell.losses(size.budget), scratch)
            rows.append([short(size.params), str(cell.growth), f"{cell.tokens:,}", *losses])
    return Table(
        title=f"{LOSSES[loss].capitalize()} at equal FLOPs (6ND)",
        note="; ".join(
            f"{short(size.params)} parameters: {size.budget:.3g} FLOPs" for size in optima.sizes
        ),
        head=["parameters", "growth", "d", "mean over seeds", "minus scratch", "all seeds"],
        rows=rows,
    )


def _losses(losses: Sequence[float], scratch: Sequence[float]) -> list[str]:
    if not losses:
        return ["-"] * 3  # The first measurement is beyond the budget.
    mean = float(np.mean(losses))
    every = ", ".join(f"{loss:.4f}" for loss in losses)
    return [f"{mean:.4f}", f"{mean - float(np.mean(scratch)):+.4f}", every]


def _optima_table(name: str, optima: Sequence[Optimum], show: Callable[[float], str]) -> Table:
    return Table(
        title=f"Best {name}",
        note="Minimum of a parabola over log10, with 95 % interval.",
        head=["parameters", "FLOPs (6ND)", "of", "best", "loss there"],
        rows=[
            [short(each.size.params), f"{each.flops:.3g}", each.fixed, *_best(each, show)]
            for each in optima
        ],
    )


def _best(each: Optimum, show: Callable[[float], str]) -> list[str]:
    if each.parabola is None:
        at, losses = min(each.points, key=lambda point: np.mean(point[1]))
        return [f"{each.why_none}; best tested {show(at)}", f"{np.mean(losses):.4f}"]
    parabola = each.parabola
    low, high = (show(end) for end in _interval(parabola))
    outside = ", outside the tested range" if parabola.is_extrapolated else ""
    loss = parabola.fit.predict((1, parabola.optimum, parabola.optimum**2))
    return [f"{show(_power(parabola.optimum))} ({low} to {high}){outside}", f"{loss:.4f}"]


def _interval(parabola: Parabola) -> list[float]:
    return [_power(end) for end in parabola.optimum_interval]


def _power(log: float) -> float:
    """Returns 10**log, or infinity if that overflows."""
    return 10**log if log < 300 else math.inf


def _figures(optima: Optima, loss: LossName) -> dict[str, Figure]:
    """Returns a figure over d and a figure over g for each size, at the largest budget."""
    figures = {}
    for size in optima.sizes:
        axes = {
            "d": (optima.timings, "tokens of the small model (d)", short),
            "g": (optima.factors, "growth factor (g)", "{:g}".format),
        }
        for letter, (found, label, show) in axes.items():
            last = max((each.flops for each in found if each.size == size), default=0)
            rows = [each for each in found if each.size == size and each.flops == last]
            if rows:
                points = {each.fixed: each.points for each in rows}
                scratch = [curve.loss_at(last) for curve in size.scratch]
                name = f"loss_over_{letter}-{size.params}"
                figures[name] = optimum_figure(points, scratch, loss, label, show)
    return figures


def _numbers(optima: Optima) -> dict[str, Any]:
    """Returns the JSON content."""
    return {
        "notes": optima.notes,
        "provenance": provenance(optima.records),
        "runs": [
            {"run": str(record.path), "charged": record.charge_numbers}
            for record in optima.records
        ],
        "timings": [_optimum_numbers(each) for each in optima.timings],
        "factors": [_optimum_numbers(each) for each in optima.factors],
        "timing_laws": {
            growth: {
                name: {"value": value, "interval": law.intervals[name]}
                for name, value in dataclasses.asdict(law.law).items()
            }
            for growth, law in optima.laws.items()
            if isinstance(law, Refit)
        },
    }


def _optimum_numbers(each: Optimum) -> dict[str, Any]:
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
