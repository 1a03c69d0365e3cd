"""A table and a figure of held-out losses."""

import statistics
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt

from scripts.cells import Cells
from stackjax.analysis.plots import sign
from stackjax.analysis.reading import read_record
from stackjax.analysis.settings import differences, settings, trace, uneven
from stackjax.analysis.tables import markdown
from stackjax.config import Config
from stackjax.files.rows_file import read_rows
from stackjax.runtime.errors import UserError
from stackjax.runtime.text_table import markdown_table


def _losses(config: Config) -> list[tuple[float, float]]:
    """Returns (FLOPs, held-out loss) at every evaluation."""
    found = [
        (row["flops_6nd"], row["held_out_loss"])
        for row in read_rows(Path(config.workdir))
        if row.get("held_out_loss") is not None
    ]
    if not found:
        raise UserError(f"{config.workdir} has no held-out loss; remove it, to run it again.")
    return found


def final_loss(config: Config) -> float:
    """Returns a run's last held-out loss."""
    return _losses(config)[-1][1]


def best(runs: Cells, count: int) -> list[str]:
    """Returns the best grown runs, then scratch."""
    grown = [(name, seed) for name, seed in runs if name != "scratch"]
    ranked = sorted(grown, key=lambda label: final_loss(runs[label]))
    return [name for name, _ in ranked[:count]] + ["scratch"]


def table(runs: Cells) -> str:
    """Returns final losses in Markdown, best first, and the provenance."""
    finals: dict[str, list[float]] = {}
    for (name, _), config in runs.items():
        finals.setdefault(name, []).append(final_loss(config))
    scratch = finals["scratch"][0]
    rows = []
    for name, losses in sorted(finals.items(), key=lambda item: item[1][0]):
        every = ", ".join(f"{loss:.4f}" for loss in losses)
        mean = f"{statistics.mean(losses):.4f}" if len(losses) > 1 else ""
        gap = f"{losses[0]:.4f} ({losses[0] - scratch:+.4f})"
        rows.append([markdown(name), gap, mean, every])
    said = [] if len(runs) > len(finals) else ["One seed; no intervals."]
    said += _notes(runs)
    below = [f"- {markdown(line)}" for line in (*said, *_trace(runs))]
    head = ["run", "held-out loss, seed 0", "mean", "all seeds"]
    return "\n".join([markdown_table(head, rows), "", *below, ""])


def _notes(runs: Cells) -> list[str]:
    """Returns a sentence for each difference between runs, besides growth."""
    records = {name: read_record(run.workdir) for (name, seed), run in runs.items() if not seed}
    ends = {name: record.flops_6nd for name, record in records.items()}
    alike = {name: settings(record) for name, record in records.items()}
    return differences(alike) + uneven(ends)


def _trace(runs: Cells) -> list[str]:
    return trace([read_record(config.workdir) for config in runs.values()])


@matplotlib.rc_context({"text.parse_math": False})
def draw(runs: Cells, output: Path) -> None:
    """Draws every run with seed 0, with a plot per timing; scratch is in all plots."""
    names = [name for name, seed in runs if seed == 0 and name != "scratch"]
    timings = list(dict.fromkeys(name.split(", ")[-1] for name in names))
    figure, plots = plt.subplots(
        1, len(timings), figsize=(6 * len(timings), 4.6), sharey=True, squeeze=False, dpi=150
    )
    figure.set_layout_engine("constrained")
    for plot, timing in zip(plots[0], timings, strict=True):
        shown = [name for name in names if name.split(", ")[-1] == timing]
        for i, name in enumerate(shown):
            color = plt.colormaps["tab10"](i % 10)
            label = name.removesuffix(f", {timing}")
            style = "--" if "width" in name else "-"
            points = _losses(runs[name, 0])
            plot.plot(*zip(*points, strict=True), style, color=color, label=label, lw=1.4)
        plot.plot(*zip(*_losses(runs["scratch", 0]), strict=True), "k:", label="scratch", lw=2)
        plot.set_title(timing)
        plot.set_xlabel("FLOPs, all stages (6 x parameters x tokens)")
        plot.grid(alpha=0.25)
        plot.spines[["top", "right"]].set_visible(False)
    last = max(final for loss in map(_losses, runs.values()) for _, final in loss[-1:])
    best = min(final_loss(config) for config in runs.values())
    plots[0][0].set_ylim(best - 0.02, last + 0.6)
    plots[0][0].set_ylabel("held-out loss, nats per token")
    plots[0][-1].legend(frameon=False, fontsize=8)
    sign(figure, _trace(runs)).savefig(output)
    plt.close(figure)
