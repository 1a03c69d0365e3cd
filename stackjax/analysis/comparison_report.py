"""The report of `compare`: tables, figures and numbers."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from stackjax.analysis.comparison import Comparison, Group, compare, group, notes
from stackjax.analysis.layer_figure import caption, layer_figure
from stackjax.analysis.page import Gallery
from stackjax.analysis.plots import loss_figure, sign
from stackjax.analysis.reading import read_record
from stackjax.analysis.record import COSTS
from stackjax.analysis.report import write_report
from stackjax.analysis.settings import provenance, settings, trace
from stackjax.analysis.speedup import CONFIDENCE
from stackjax.analysis.tables import (
    LOSSES,
    SMOOTHING,
    Table,
    budgets_table,
    crossings_table,
    losses_table,
    provenance_table,
    runs_table,
    verdict,
)
from stackjax.options import CompareConfig, LossName

FIGURES = ("flops_6nd", "tokens", "device_seconds")
"""The costs that the loss is drawn over."""


def write(config: CompareConfig) -> str:
    """Writes the comparison, and returns it as Markdown.

    Raises:
      UserError: The runs do not compare.
    """
    records = [read_record(path) for path in config.runs]
    groups = group(records)
    comparisons = compare(groups, config.loss, losses=config.losses, budgets=config.budgets)
    verdicts = [verdict(each, config.loss) for each in comparisons]
    return write_report(
        config.output,
        "comparison",
        title="Does growing pay?",
        said=[*verdicts, *notes(groups)],
        figures={
            f"loss_over_{cost}": sign(loss_figure(groups, config.loss, cost), trace(records))
            for cost in FIGURES
            if all(record.knows(cost) for record in records)
        },
        tables=tables_of(groups, comparisons, config.loss),
        numbers=report(groups, comparisons, config.loss),
        galleries=_layers(groups),
    )


def _layers(groups: Sequence[Group]) -> list[Gallery]:
    """Returns pictures of the layers of each grown group that has measured them."""
    figures, (_, *grown) = {}, groups
    for number, each in enumerate(grown, start=1):
        record = each.records[0]
        figure = layer_figure(record)
        if figure is not None:
            signed = sign(figure, trace([record]))
            figures[f"layers-{number}"] = signed, caption(record, each.label)
    return [Gallery(title="What growth does to layers", figures=figures)] if figures else []


def tables_of(
    groups: Sequence[Group], comparisons: Sequence[Comparison], loss: LossName
) -> list[Table]:
    """Returns the tables of a comparison, in order."""
    each = [table(one, loss) for one in comparisons for table in (losses_table, budgets_table)]
    records = [record for each in groups for record in each.records]
    first, last = runs_table(groups, loss), provenance_table(records)
    return [first, *each, crossings_table(comparisons), last]


def report(
    groups: Sequence[Group], comparisons: Sequence[Comparison], loss: LossName
) -> dict[str, Any]:
    """Returns all that was found, for machines; what is not known is null."""
    runs = []
    for each in groups:
        for record in each.records:
            curve = record.curve(loss)
            last: dict[str, Any] = {cost: float(curve.costs[cost][-1]) for cost in COSTS}
            last |= {"seed": record.config["seed"], "loss": float(curve.losses[-1])}
            last |= {
                "started_from": record.config.get("init_from"),
                "charged": dataclasses.asdict(record.charge) if record.origin else None,
                "is_finished": record.is_finished,
                "settings": settings(record),
            }
            runs.append({"run": str(record.path), "training": each.label} | last)
    return {
        "loss": LOSSES[loss],
        "smoothing": SMOOTHING,
        "confidence": CONFIDENCE,
        "notes": notes(groups),
        "provenance": provenance([record for each in groups for record in each.records]),
        "runs": runs,
        "comparisons": [_plain(each) for each in comparisons],
    }


def _plain(comparison: Comparison) -> dict[str, Any]:
    return {
        "grown": comparison.grown.label,
        "scratch": comparison.scratch.label,
        "at_losses": [
            {cost: dataclasses.asdict(speedup) for cost, speedup in by_cost.items()}
            for by_cost in comparison.at_losses.values()
        ],
        "at_budgets": {
            cost: [dataclasses.asdict(each) for each in budgets]
            for cost, budgets in comparison.at_budgets.items()
        },
        "crossings": comparison.crossings,
    }
