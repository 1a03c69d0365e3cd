"""Layer statistics as a figure: similarity of copies, contribution, weight size."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes as Plot
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from stackjax.analysis.plots import COLORS, INK, in_ink
from stackjax.analysis.record import Record
from stackjax.runtime.numbers import short

Row = Mapping[str, Any]

_LABELS = {
    "similarity": "similarity of copies (cosine)",
    "contribution": "contribution (output / input)",
    "norm": "weight size (RMS)",
}
_SHADES = 0.4, 0.75
"""Colormap range with enough contrast on white and on black."""


@in_ink
def layer_figure(record: Record) -> Figure | None:
    """Returns the similarity of copies over tokens, and layer statistics around growth.

    The first panel has a line per layer; models without copies lack this panel. None if layer
    statistics were not measured at the last growth.
    """
    seams, alike = _seams(record), [row for row in record.layers if _has_copies(row)]
    if not seams:
        return None
    names = [name for name in _LABELS if alike or name != "similarity"]
    figure = Figure(figsize=(4.4, 2.6 * len(names)), dpi=200, layout="constrained")
    plots: dict[str, Plot] = dict(zip(names, figure.subplots(len(names)), strict=True))
    if alike:
        _draw_copies(plots["similarity"], alike, record.seams[0]["tokens"])
    for name in ("contribution", "norm"):
        _draw_layers(plots[name], name, seams, record.layers[-1])
    # Early layers contribute far more than late layers.
    plots["contribution"].set_yscale("log")
    plots["contribution"].yaxis.set_major_formatter("{x:g}")
    figure.align_ylabels()
    for name, plot in plots.items():
        plot.set_ylabel(_LABELS[name])
        plot.grid(alpha=0.2)
        plot.spines[["top", "right"]].set_visible(False)
        if name != "norm":
            plot.legend(frameon=False, fontsize=8)
    return figure


def caption(record: Record, label: str) -> str:
    """Returns the figure's caption."""
    run = f"{label}, seed {record.config['seed']}"
    after, last = _seams(record)[-1], record.layers[-1]
    if not _has_copies(after):
        return (
            f"{run}: each layer's contribution to the residual stream and weight size, before "
            f"growth, after growth, and at the end."
        )
    first, final = (np.nanmean(_numbers(row["similarity"])) for row in (after, last))
    return (
        f"{run}: the mean cosine similarity between a layer's weights and its copies is "
        f"{first:.3f} just after growth and {final:.3f} at the end."
    )


def _seams(record: Record) -> list[Row]:
    """Returns the rows at the last growth, and at the end of a fit, if any."""
    return [
        row
        for row in record.layers
        if row["stage"] == record.final_stage and "norm_before" in row
    ]


def _has_copies(row: Row) -> bool:
    """Returns whether any layer has copies."""
    return any(value is not None for value in row.get("similarity", ()))


def _draw_copies(plot: Plot, rows: Sequence[Row], grown_at: int) -> None:
    # Layers before and after a further growth differ.
    for depth, same in itertools.groupby(rows, lambda row: len(row["similarity"])):
        part = list(same)
        tokens = [row["tokens"] - grown_at for row in part]
        colors = matplotlib.colormaps["plasma"](np.linspace(*_SHADES, depth))
        layers = np.transpose([_numbers(row["similarity"]) for row in part])
        for number, (layer, color) in enumerate(zip(layers, colors, strict=True), start=1):
            is_named = part[-1] is rows[-1] and number in (1, depth)
            label = f"layer {number}" if is_named else "_"
            plot.plot(tokens, layer, color=color, label=label, lw=1.3)
    plot.xaxis.set_major_formatter(lambda tokens, _: short(tokens))
    plot.set_xlabel("tokens since the first growth")


def _draw_layers(plot: Plot, name: str, seams: Sequence[Row], last: Row) -> None:
    # Rings stay visible around equal values after growth.
    ring = {"color": INK, "ls": ":", "marker": "o", "mfc": "none", "ms": 8}
    after = {"color": COLORS[1], "ls": "--", "marker": "."}
    end = {"color": COLORS[0], "marker": "."}
    lines = [
        ("before growth", seams[0][f"{name}_before"], ring),
        ("just after", seams[-1][name], after),
    ]
    if last is not seams[-1]:
        lines.append(("at the end", last[name], end))
    for label, values, style in lines:
        layers = range(1, len(values) + 1)
        plot.plot(layers, _numbers(values), label=label, lw=1.3, **style)
    plot.xaxis.set_major_locator(MaxNLocator(integer=True))
    plot.set_xlabel("layer")


def _numbers(values: Sequence[float | None]) -> np.ndarray:
    """Returns values as an array, with NaN for None."""
    return np.array(values, float)
