"""A picture of a grown run's layers: how alike copies stay, what each adds, how large it is."""

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
    "contribution": "what it adds / what it reads",
    "norm": "size of weights (RMS)",
}
_SHADES = 0.4, 0.75
"""The part of a colormap of even steps that is seen on white and on black."""


@in_ink
def layer_figure(record: Record) -> Figure | None:
    """Returns how alike copies are over tokens, and what layers are around the last growth.

    A line of the first panel is a layer; without copies there is no such panel. None where the
    layers were not measured at the growth.
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
    # What enters the first layer is small beside what it adds, and later ones add little.
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
    """Returns in a sentence what the figure of a run, where there is one, shows."""
    run = f"{label}, seed {record.config['seed']}"
    after, last = _seams(record)[-1], record.layers[-1]
    if not _has_copies(after):
        return (
            f"{run}: what each layer adds to the residual stream, and how large its weights "
            f"are, before and after growth, and at the end."
        )
    first, final = (np.nanmean(_numbers(row["similarity"])) for row in (after, last))
    return (
        f"{run}: the weights of a layer and of its copies have a mean cosine similarity of "
        f"{first:.3f} just after growth and of {final:.3f} at the end."
    )


def _seams(record: Record) -> list[Row]:
    """Returns the rows at the last growth, and at the end of its fit where it has one."""
    return [
        row
        for row in record.layers
        if row["stage"] == record.final_stage and "norm_before" in row
    ]


def _has_copies(row: Row) -> bool:
    """Returns whether some layer has copies."""
    return any(value is not None for value in row.get("similarity", ()))


def _draw_copies(plot: Plot, rows: Sequence[Row], grown_at: int) -> None:
    # Where the depth changes again, its layers are others.
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
    # Rings, which are seen around what comes after where that is the same.
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
    """Returns the numbers of a row, NaN where there is none."""
    return np.array(values, float)
