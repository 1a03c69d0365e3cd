"""Pictures of runs: their loss over what they have spent."""

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
from stackjax.analysis.record import COSTS
from stackjax.analysis.run_ends import End
from stackjax.analysis.scaling import GapLaw, PowerLaw
from stackjax.analysis.tables import LOSSES
from stackjax.options import LossName

# Told apart on white and on black, and by the eyes that cannot tell red from green.
COLORS = ("#d1495b", "#3d85c6", "#d99a2b", "#8e6bbf", "#2a9d8f", "#a0724c")
INK = "#0a0b0c"
"""The color of text, of scratch and of what was before, which a page replaces by its own."""
_PRINT = 135
"""The characters of small print in a line."""
_SHOWN_FROM = 0.06
"""The share of a run's cost whose loss is the top of the picture."""


in_ink = matplotlib.rc_context(
    {
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.edgecolor": INK,
        "xtick.color": INK,
        "ytick.color": INK,
        "text.parse_math": False,  # the dollars in a path are no formula
    }
)


@in_ink
def sign(figure: Figure, lines: Sequence[str]) -> Figure:
    """Returns a figure with lines of small print under it, so that it can be traced alone."""
    wrapped = [part for line in lines for part in textwrap.wrap(line, _PRINT) or [""]]
    figure.supxlabel("\n".join(wrapped), x=0.02, ha="left", fontsize=4)
    figure.set_figheight(figure.get_figheight() + 0.09 * len(wrapped))
    return figure


@in_ink
def loss_figure(groups: Sequence[Group], loss: LossName, cost: str) -> Figure:
    """Returns the losses of every run over a cost; a dotted line where a model grows."""
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
    varied: str,
    show: Callable[[float], str],
) -> Figure:
    """Returns final losses over what was varied, by name; dots are seeds, lines their means.

    Args:
      points: What was varied, and the losses of the seeds.
      scratch: Those of the runs from scratch, whose mean is dashed.
      loss: Which loss it is.
      varied: What to call what was varied.
      show: How to write a number of it.
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
    plot.set_xlabel(varied)
    plot.set_ylabel(f"{LOSSES[loss]}, nats per token")
    # The lines fill the plot.
    figure.legend(loc="outside upper center", ncols=2, frameon=False, fontsize=8)
    return figure


@in_ink
def laws_figure(
    ends: Mapping[str, Sequence[End]], laws: Mapping[str, PowerLaw], flops: float
) -> Figure:
    """Returns the ends of runs over FLOPs, scratch first, and their laws with 95 % intervals.

    Args:
      flops: How far the laws are drawn.
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
    plot.set_ylabel("loss at the end, nats per token")
    plot.legend(frameon=False, fontsize=8)
    return figure


@in_ink
def gap_figure(
    gaps: Mapping[str, Sequence[tuple[int, float]]], laws: Mapping[str, GapLaw], tokens: float
) -> Figure:
    """Returns the gaps between scratch and grown over tokens, and their 95 % intervals.

    Args:
      tokens: How far the laws are drawn.
    """
    figure, plot = _blank()
    x = np.geomspace(min(at for name in laws for at, _ in gaps[name]), tokens, 200)
    for name, color in zip(laws, itertools.cycle(COLORS)):
        _draw_law(plot, name, gaps[name], laws[name], x, color)
    plot.axhline(0, color=INK, ls="--", lw=1)
    plot.set_xscale("log")
    plot.set_xlabel("tokens from scratch (D)")
    plot.set_ylabel("scratch's loss less grown's, nats")
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
    """Draws points, and the law through them with its 95 % interval; that of scratch dashed."""
    style = "--" if name == "scratch" else "-"
    plot.plot(*zip(*points, strict=True), ".", color=color)
    plot.plot(x, [law(at) for at in x], style, color=color, lw=1.3, label=name)
    low, high = zip(*(law.interval(at) for at in x), strict=True)
    plot.fill_between(x, low, high, color=color, alpha=0.12, lw=0)


def _blank() -> tuple[Figure, Plot]:
    """Returns a figure as wide as a telephone, so that its letters are as large there."""
    figure = Figure(figsize=(4.4, 3.3), dpi=200, layout="constrained")
    plot: Plot = figure.subplots()
    plot.grid(alpha=0.2)
    plot.spines[["top", "right"]].set_visible(False)
    return figure, plot


def svg(figure: Figure) -> str:
    """Returns a figure as SVG for a page, its ink in the color of the page's text."""
    out = io.StringIO()
    # The same bytes for the same figure: ids are not random, and there is no date.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "stackjax"}):
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    text = out.getvalue()
    return re.sub(re.escape(INK), "currentColor", text[text.index("<svg") :])
