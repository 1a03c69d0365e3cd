"""Figures: loss over cost, d or g, and scaling laws."""

import io
import itertools
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence

import matplotlib
import matplotlib.ticker
import numpy as np
from matplotlib.axes import Axes as Plot
from matplotlib.figure import Figure

from stackjax.analysis.comparison import Group
from stackjax.analysis.names import COSTS, LOSSES
from stackjax.analysis.run_ends import End
from stackjax.analysis.scaling import GapLaw, PowerLaw
from stackjax.options import LossName

# Distinguishable on white, on black, and for color-blind readers.
COLORS = ("#d1495b", "#3d85c6", "#d99a2b", "#8e6bbf", "#2a9d8f", "#a0724c")
INK = "#0a0b0c"
"""Color for text and scratch; HTML pages use the page's text color."""
_PRINT = 135
"""Characters per small-print line."""
_SHOWN_FROM = 0.06
"""A figure's top is the loss at this share of the cost."""


in_ink = matplotlib.rc_context(
    {
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.edgecolor": INK,
        "xtick.color": INK,
        "ytick.color": INK,
        "text.parse_math": False,  # paths may contain dollar signs
    }
)


@in_ink
def sign(figure: Figure, lines: Sequence[str]) -> Figure:
    """Returns the figure with small print for provenance."""
    wrapped = [part for line in lines for part in textwrap.wrap(line, _PRINT) or [""]]
    figure.supxlabel("\n".join(wrapped), x=0.02, ha="left", fontsize=4)
    figure.set_figheight(figure.get_figheight() + 0.09 * len(wrapped))
    return figure


@in_ink
def loss_figure(groups: Sequence[Group], loss: LossName, cost: str) -> Figure:
    """Returns every run's loss over a cost; dotted lines mark growth."""
    figure, plot = _blank()
    colors = itertools.cycle(COLORS)
    for each in groups:
        color = next(colors) if each.is_grown else INK
        for i, record in enumerate(each.records):
            costs, losses = record.all_losses(loss, cost)
            label = each.label if i == 0 else "_"
            style = "-" if each.is_grown else "--"
            plot.plot(costs, losses, style, color=color, label=label, lw=1.3, alpha=0.85)
            for at in costs[np.isnan(losses)]:
                plot.axvline(at, color=color, ls=":", lw=0.8)
    curves = [curve for each in groups for curve in each.curves(loss, cost)]
    lowest = min(curve.last_loss for curve in curves)
    top = max(
        curve.loss_at(max(curve.first_cost, _SHOWN_FROM * curve.last_cost)) for curve in curves
    )
    margin = 0.04 * (top - lowest)
    plot.set_ylim(lowest - margin, top + margin)
    plot.set_xlabel(COSTS[cost])
    plot.set_ylabel(f"{LOSSES[loss]}, nats per token")
    plot.legend(frameon=False, fontsize=8)
    return figure


@in_ink
def optimum_figure(
    points: Mapping[str, Sequence[tuple[float, Sequence[float]]]],
    scratch: Sequence[float],
    loss: LossName,
    label: str,
    show: Callable[[float], str],
) -> Figure:
    """Returns losses over d or g; dots are seeds, lines are means.

    Args:
      points: By name, pairs: d or g, and all seeds' losses.
      scratch: Losses from scratch; the mean is a dashed line.
      label: x-axis label.
      show: Formats an x-axis tick.
    """
    figure, plot = _blank()
    for name, color in zip(points, itertools.cycle(COLORS)):
        xs = [x for x, _ in points[name]]
        means = [float(np.mean(losses)) for _, losses in points[name]]
        plot.plot(xs, means, "-", color=color, label=name, lw=1.3)
        for x, losses in points[name]:
            plot.plot([x] * len(losses), losses, ".", color=color, alpha=0.6)
    plot.axhline(float(np.mean(scratch)), color=INK, ls="--", lw=1.3, label="scratch")
    plot.set_xscale("log")
    tried = sorted({x for each in points.values() for x, _ in each})
    plot.set_xticks(tried, [show(x) for x in tried])
    plot.set_xticks([], minor=True)
    plot.set_xlabel(label)
    plot.set_ylabel(f"{LOSSES[loss]}, nats per token")
    # Above the plot, because the lines fill it.
    figure.legend(loc="outside upper center", ncols=2, frameon=False, fontsize=8)
    return figure


@in_ink
def laws_figure(
    ends: Mapping[str, Sequence[End]], laws: Mapping[str, PowerLaw], flops: float
) -> Figure:
    """Returns final losses over FLOPs, with their laws and 95 % intervals.

    Args:
      flops: Right end.
    """
    figure, plot = _blank()
    first = min(end.flops for name in laws for end in ends[name])
    x = np.geomspace(first, flops, 200)
    colors = itertools.chain([INK], itertools.cycle(COLORS))
    for name, color in zip(laws, colors, strict=False):
        points = [(end.flops, end.loss) for end in ends[name]]
        _draw_law(plot, name, points, laws[name], x, color)
    plot.set_xscale("log")
    plot.set_yscale("log")
    lowest = min(law(flops) for law in laws.values())
    highest = max(end.loss for name in laws for end in ends[name])
    plot.set_ylim(lowest / 1.15, highest * 1.05)
    plot.yaxis.set_major_locator(matplotlib.ticker.MaxNLocator(6))
    plot.yaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%.2f"))
    plot.yaxis.set_minor_locator(matplotlib.ticker.NullLocator())
    plot.set_xlabel(COSTS["flops_6nd"])
    plot.set_ylabel("final loss, nats per token")
    plot.legend(frameon=False, fontsize=8)
    return figure


@in_ink
def gap_figure(
    gaps: Mapping[str, Sequence[tuple[int, float]]], laws: Mapping[str, GapLaw], tokens: float
) -> Figure:
    """Returns loss gaps over tokens, with their laws and 95 % intervals.

    Args:
      tokens: Right end.
    """
    figure, plot = _blank()
    x = np.geomspace(min(at for name in laws for at, _ in gaps[name]), tokens, 200)
    for name, color in zip(laws, itertools.cycle(COLORS)):
        _draw_law(plot, name, gaps[name], laws[name], x, color)
    plot.axhline(0, color=INK, ls="--", lw=1)
    plot.set_xscale("log")
    plot.set_xlabel("tokens from scratch (D)")
    plot.set_ylabel("scratch's loss minus grown, nats")
    plot.legend(frameon=False, fontsize=8)
    return figure


def _draw_law(
    plot: Plot,
    name: str,
    points: Sequence[tuple[float, float]],
    law: PowerLaw | GapLaw,
    x: np.ndarray,
    color: str,
) -> None:
    """Draws points and their law with 95 % intervals; scratch is dashed."""
    style = "--" if name == "scratch" else "-"
    plot.plot(*zip(*points, strict=True), ".", color=color)
    plot.plot(x, [law(at) for at in x], style, color=color, lw=1.3, label=name)
    low, high = zip(*(law.interval(at) for at in x), strict=True)
    plot.fill_between(x, low, high, color=color, alpha=0.12, lw=0)


def _blank() -> tuple[Figure, Plot]:
    """Returns an empty figure, narrow enough for phones."""
    figure = Figure(figsize=(4.4, 3.3), dpi=200, layout="constrained")
    plot: Plot = figure.subplots()
    plot.grid(alpha=0.2)
    plot.spines[["top", "right"]].set_visible(False)
    return figure, plot


def svg(figure: Figure) -> str:
    """Returns the figure as SVG, in the page's text color."""
    out = io.StringIO()
    # Deterministic output: fixed ids and no date.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "stackjax"}):
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    text = out.getvalue()
    return re.sub(re.escape(INK), "currentColor", text[text.index("<svg") :])
