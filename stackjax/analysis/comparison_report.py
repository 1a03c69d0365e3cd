"""Reports on grown runs against runs from scratch."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from stackjax.analysis.comparison import Comparison, Group, compare, group, notes
from stackjax.analysis.layer_figure import caption, layer_figure
from stackjax.analysis.names import COSTS, LOSSES
from stackjax.analysis.page import Gallery
from stackjax.analysis.plots import loss_figure, sign
from stackjax.analysis.reading import read_record
from stackjax.analysis.record import Record
from stackjax.analysis.report import write_report
from stackjax.analysis.settings import provenance, settings, trace
from stackjax.analysis.speedup import CONFIDENCE
from stackjax.analysis.tables import (
    SMOOTHING,
    Table,
    budgets_table,
    crossings_table,
    losses_table,
    provenance_table,
    runs_table,
    sources_table,
    verdict,
)
from stackjax.files.output import check_output_directory
from stackjax.options import CompareConfig, LossName

FIGURES = ("flops_6nd", "tokens", "device_seconds")
"""Costs on the loss figures' x axes."""


def write(config: CompareConfig) -> str:
    """Writes the comparison, and returns it as Markdown.

    Raises:
      UserError: The runs are not comparable, or the output directory is not writable.
    """
    check_output_directory("--output", config.output)
    loss, records = config.loss, [read_record(path) for path in config.runs]
    groups = group(records)
    comparisons = compare(groups, loss, losses=config.losses, budgets=config.budgets)
    return write_report(
        config.output,
        "comparison",
        title="Does growing pay?",
        said=[*(verdict(each, loss) for each in comparisons), *notes(groups)],
        figures={
            f"loss_over_{cost}": sign(loss_figure(groups, loss, cost), trace(records))
            for cost in FIGURES
            if all(record.knows(cost) for record in records)
        },
        tables=_tables(groups, comparisons, loss),
        numbers=_numbers(groups, comparisons, loss),
        galleries=_layer_galleries(groups),
    )


def _layer_galleries(groups: Sequence[Group]) -> list[Gallery]:
    """Returns a layer figure for each grown group with layer statistics."""
    figures, (_, *grown) = {}, groups
    for number, each in enumerate(grown, start=1):
        record = each.records[0]
        figure = layer_figure(record)
        if figure is not None:
            signed = sign(figure, trace([record]))
            figures[f"layers-{number}"] = signed, caption(record, each.label)
    return [Gallery(title="What growth does to layers", figures=figures)] if figures else []


def _tables(
    groups: Sequence[Group], comparisons: Sequence[Comparison], loss: LossName
) -> list[Table]:
    sources = sources_table(groups)
    return [
        runs_table(groups, loss),
        *([] if sources is None else [sources]),
        *(table(each, loss) for each in comparisons for table in (losses_table, budgets_table)),
        crossings_table(comparisons),
        provenance_table([record for each in groups for record in each.records]),
    ]


def _numbers(
    groups: Sequence[Group], comparisons: Sequence[Comparison], loss: LossName
) -> dict[str, Any]:
    """Returns the JSON content; unknown numbers are null."""
    return {
        "loss": LOSSES[loss],
        "smoothing": SMOOTHING,
        "confidence": CONFIDENCE,
        "notes": notes(groups),
        "provenance": provenance([record for each in groups for record in each.records]),
        "runs": [
            _run_numbers(record, each.label, loss) for each in groups for record in each.records
        ],
        "comparisons": [_comparison_numbers(each) for each in comparisons],
    }


def _run_numbers(record: Record, label: str, loss: LossName) -> dict[str, Any]:
    curve = record.curve(loss)
    return {
        "run": str(record.path),
        "training": label,
        **{cost: float(curve.costs[cost][-1]) for cost in COSTS},
        "seed": record.config["seed"],
        "loss": float(curve.losses[-1]),
        "started_from": record.config.get("init_from"),
        "charged": record.charge_numbers,
        "is_finished": record.is_finished,
        "sources": record.final_sources,
        "settings": settings(record),
    }


def _comparison_numbers(comparison: Comparison) -> dict[str, Any]:
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
