"""Comparison tables, in Markdown and HTML."""

import dataclasses
import html
import math
import re
from collections.abc import Mapping, Sequence

from stackjax.analysis.comparison import Comparison, Group
from stackjax.analysis.names import COSTS, LOSSES
from stackjax.analysis.record import Record
from stackjax.analysis.settings import provenance
from stackjax.analysis.speedup import AtBudget, Estimate, Speedup
from stackjax.options import LossName
from stackjax.runtime.text_table import markdown_table

SMOOTHING = (
    "Curves are isotonic regressions of log loss, interpolated linearly in log loss over log "
    "cost."
)

_MARKED = re.compile(r"[|`*\\]|<(?=[A-Za-z/!?])|(?<!\w)_|_(?!\w)|\](?=[(\[])|&(?=#?\w+;)")
"""Characters with a meaning in Markdown or inline HTML."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
    """A table with a heading and a note."""

    title: str
    note: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        """Returns the table in Markdown."""
        head, *rows = ([markdown(cell) for cell in line] for line in (self.head, *self.rows))
        table = markdown_table(head, rows)
        return f"### {markdown(self.title)}\n\n{markdown(self.note)}\n\n{table}\n"

    def html(self) -> str:
        """Returns the table in HTML; wide tables scroll."""
        head = "".join(f"<th>{html.escape(cell)}</th>" for cell in self.head)
        body = "".join(
            f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>\n"
            for row in self.rows
        )
        return (
            f"<h2>{html.escape(self.title)}</h2>\n<p>{html.escape(self.note)}</p>\n"
            f'<div class="wide"><table><thead><tr>{head}</tr></thead>\n<tbody>\n{body}'
            f"</tbody></table></div>\n"
        )


def markdown(text: str) -> str:
    """Returns text with Markdown characters escaped, on a single line."""
    return _MARKED.sub(r"\\\g<0>", " ".join(text.split()))


def verdict(comparison: Comparison, loss: LossName) -> str:
    """Returns a sentence about the speed-up at the lowest loss reached by both sides.

    The speed-up is in FLOPs. Costs with the opposite sign are added.
    """
    name, grown = LOSSES[loss], comparison.grown.label
    known = {
        level: by_cost["flops_6nd"]
        for level, by_cost in comparison.at_losses.items()
        if by_cost["flops_6nd"].estimate is not None
    }
    exact = {level: speedup for level, speedup in known.items() if not speedup.is_bound}
    if not known:
        return f"{grown}: the two sides reach no common {name}."
    level = min(exact or known)
    speedup, opposite = known[level], _opposite(comparison.at_losses[level])
    assert speedup.estimate is not None, "known has estimates only"
    shown = show_speedup(speedup)
    if speedup.is_bound:
        late = "scratch" if speedup.is_bound == ">" else "the grown run"
        return (
            f"{grown}: {late} has not reached a {name} of {level:.4f}; the speed-up in FLOPs "
            f"(6ND) there is {shown}.{opposite}"
        )
    return (
        f"{grown}: {_share(speedup.estimate.value)} scratch at a {name} of {level:.4f}, all "
        f"stages included: a speed-up of {shown}{_certainty(comparison, speedup)}.{opposite}"
    )


def _share(speedup: float) -> str:
    """Returns the grown run's FLOPs relative to scratch, in words."""
    share = -100 * math.expm1(-math.log1p(speedup))
    if abs(speedup) < 5e-4:  # rounds to 0.0 %
        return "as many FLOPs (6ND) as"
    return f"{abs(share):.1f} % {'fewer' if share > 0 else 'more'} FLOPs (6ND) than"


def _certainty(comparison: Comparison, speedup: Speedup) -> str:
    """Returns a remark on the interval: missing, or with 0 inside."""
    estimate = speedup.estimate
    if estimate is None or estimate.low is None or estimate.high is None:
        few = [
            name
            for name, side in (("scratch", comparison.scratch), ("grown", comparison.grown))
            if len(side.records) == 1
        ]
        return f" (one seed of {' and of '.join(few)}; no interval)"
    has_zero = estimate.low <= 0 <= estimate.high
    return "; the interval includes 0, so the difference is not significant" if has_zero else ""


def _opposite(by_cost: Mapping[str, Speedup]) -> str:
    """Returns a sentence about costs with the opposite sign, if any."""
    sign = by_cost["flops_6nd"].sign
    opposite = [
        f"{COSTS[cost]} ({show_speedup(speedup)})"
        for cost, speedup in by_cost.items()
        if sign * speedup.sign < 0
    ]
    if not opposite:
        return ""
    return f" Growing {'loses' if sign > 0 else 'wins'} in {' and in '.join(opposite)}."


def runs_table(groups: Sequence[Group], loss: LossName) -> Table:
    """Returns every run's cost and final loss."""
    rows = []
    for each in groups:
        for record in each.records:
            curve = record.curve(loss)
            spent = [show_cost(cost, curve.costs[cost][-1]) for cost in COSTS]
            seed = str(record.config["seed"])
            rows.append([each.label, seed, f"{curve.losses[-1]:.4f}", *spent, str(record.path)])
    return Table(
        title="Runs",
        note=f"Final {LOSSES[loss]} and cost so far, in all stages.",
        head=["run", "seed", LOSSES[loss], *COSTS.values(), "directory"],
        rows=rows,
    )


def sources_table(groups: Sequence[Group]) -> Table | None:
    """Returns every run's last validation loss by source; None without mixtures."""
    rows = [
        [each.label, str(record.config["seed"]), name, f"{loss:.4f}", f"{epochs:.2f}"]
        for each in groups
        for record in each.records
        for name, (loss, epochs) in record.final_sources.items()
    ]
    if not rows:
        return None
    return Table(
        title="Sources",
        note="Last held-out loss on each source, and how often the run has read the source.",
        head=["run", "seed", "source", "held-out loss", "epochs"],
        rows=rows,
    )


def provenance_table(records: Sequence[Record]) -> Table:
    """Returns models, data, learning rates and paths."""
    return Table(
        title="Provenance",
        note="Data: first digits of the digest. Learning rates: peak of each stage.",
        head=["", ""],
        rows=[[name, value] for name, value in provenance(records).items()],
    )


def losses_table(comparison: Comparison, loss: LossName) -> Table:
    """Returns the speed-up at each loss, by every cost."""
    return Table(
        title=f"{comparison.grown.label}: speed-up at equal {LOSSES[loss]}",
        note=(
            "Scratch's cost to reach a loss, over the grown run's cost, minus 1; "
            f"{_intervals(comparison)}. {SMOOTHING} > or <: a side has not reached the loss. "
            "-: neither side has, a side starts below the loss, or the cost is unknown."
        ),
        head=[LOSSES[loss], *COSTS.values()],
        rows=[
            [f"{level:.4f}", *(show_speedup(by_cost[cost]) for cost in COSTS)]
            for level, by_cost in comparison.at_losses.items()
        ],
    )


def budgets_table(comparison: Comparison, loss: LossName) -> Table:
    """Returns both losses and the speed-up at each budget."""
    return Table(
        title=f"{comparison.grown.label}: {LOSSES[loss]} at equal cost",
        note=f"Means over seeds; {_intervals(comparison)}. The speed-up is at the grown run's "
        "loss.",
        head=["cost", "budget", "scratch", "grown", "grown - scratch", "speed-up"],
        rows=[
            [COSTS[cost], show_cost(cost, each.cost), *_budget_cells(each)]
            for cost, at_cost in comparison.at_budgets.items()
            for each in at_cost
        ],
    )


def crossings_table(comparisons: Sequence[Comparison]) -> Table:
    """Returns the costs beyond which growing wins."""
    return Table(
        title="Where growing begins to pay",
        note="Beyond this cost, the grown run's mean loss is lower to the end.",
        head=["run", *COSTS.values()],
        rows=[
            [
                each.grown.label,
                *(_show_crossing(cost, each.crossings[cost]) for cost in COSTS),
            ]
            for each in comparisons
        ],
    )


def _intervals(comparison: Comparison) -> str:
    seeds = min(len(side.records) for side in (comparison.scratch, comparison.grown))
    return "95 % intervals over seeds" if seeds > 1 else "a single seed, so no intervals"


def show_speedup(speedup: Speedup) -> str:
    """Returns a speed-up such as `+46.3 % (30.1 to 64.5)` or `> +12.0 %`."""
    if speedup.estimate is None:
        return "-"
    bound = f"{speedup.is_bound} " if speedup.is_bound else ""
    return bound + _show(speedup.estimate, "{:+.1f}", 100, " %")


def show_cost(cost: str, value: float) -> str:
    """Returns a cost with a unit."""
    if math.isnan(value):
        return "-"
    if cost == "device_seconds":
        return f"{value:,.0f} s" if value < 36_000 else f"{value / 3600:,.1f} h"
    if cost == "tokens":
        return f"{value:.4g}" if value >= 1e6 else f"{value:,.0f}"
    return f"{value:.3e}"


def _show(estimate: Estimate, form: str, scale: float, unit: str) -> str:
    text = form.format(scale * estimate.value) + unit
    if estimate.low is None or estimate.high is None:
        return text
    low, high = (form.format(scale * x) for x in (estimate.low, estimate.high))
    return f"{text} ({low} to {high})"


def _budget_cells(each: AtBudget) -> list[str]:
    losses = ["-" if x is None else f"{x:.4f}" for x in (each.scratch, each.grown)]
    gap = "-" if each.gap is None else _show(each.gap, "{:+.4f}", 1, "")
    return [*losses, gap, "-" if each.speedup is None else show_speedup(each.speedup)]


def _show_crossing(cost: str, value: float | None) -> str:
    return "never" if value is None else show_cost(cost, value)
