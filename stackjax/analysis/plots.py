"""Held-out loss over FLOPs, of several runs in one picture.

`python -m stackjax.analysis.plots runs/tiny runs/tiny_scratch --output loss.png`; needs
matplotlib, which is among the development requirements.
"""

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import matplotlib.pyplot as plt
import tyro
from matplotlib.axes import Axes as Plot

from stackjax.errors import one_line_errors
from stackjax.metrics import read_rows

_COLORS = ("#c8442b", "#3b6ea5", "#5a8f3c", "#8a5aa8", "#b8860b")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlotConfig:
    """Draws the held-out loss of runs over their cumulative FLOPs."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Run directories."""
    output: Path
    """Picture to write: .png, .svg or .pdf."""


def plot_runs(config: PlotConfig) -> None:
    """Writes the picture; ValueError where a run has no held-out losses."""
    figure, plot = plt.subplots(figsize=(7.2, 4.2), dpi=160, layout="constrained")
    for i, run in enumerate(config.runs):
        rows = read_rows(run)
        if not any("held_out_loss" in row for row in rows):
            raise ValueError(f"{run} has no held-out losses in its metrics.jsonl.")
        _draw(plot, run.name, rows, _COLORS[i % len(_COLORS)])
    plot.set_xlabel("FLOPs, all stages (6 x parameters x tokens)")
    plot.set_ylabel("held-out loss, nats per token")
    plot.grid(alpha=0.25)
    plot.spines[["top", "right"]].set_visible(False)
    plot.legend(frameon=False)
    figure.savefig(config.output)
    plt.close(figure)


def _draw(plot: Plot, label: str, rows: Sequence[Mapping[str, Any]], color: str) -> None:
    """Draws one run: a line for each phase, and the jump where its model grew."""
    for phase in sorted({row["phase"] for row in rows}):
        points = [
            (row["flops_6nd"], row["held_out_loss"])
            for row in rows
            if row["phase"] == phase and "held_out_loss" in row
        ]
        following = [row for row in rows if row["kind"] == "growth" and row["phase"] > phase]
        if following:
            seam = following[0]
            points.append((seam["flops_6nd"], seam["held_out_loss_before"]))
            losses = (seam["held_out_loss_before"], seam["held_out_loss"])
            plot.plot([seam["flops_6nd"]] * 2, losses, color=color, linestyle=":")
            plot.annotate(
                "growth",
                (seam["flops_6nd"], max(losses)),
                xytext=(6, 2),
                textcoords="offset points",
                color=color,
            )
        plot.plot(*zip(*points, strict=True), color=color, label=label, marker=".")
        label = "_"  # one entry in the legend for all phases


def main() -> None:
    """Runs the command line."""
    with one_line_errors():
        prog = "python -m stackjax.analysis.plots"
        plot_runs(tyro.cli(PlotConfig, prog=prog, args=sys.argv[1:]))


if __name__ == "__main__":
    main()
