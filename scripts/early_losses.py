"""Do early losses predict the order of the last ones?

    python -m scripts.early_losses configs/evidence/*.py

For arms of a question with equal FLOPs, takes the mean losses at several shares of the FLOPs,
and compares their order with the order at the end: Spearman's rank correlation over the arms,
and the regret, which is the final loss of the arm that led early minus the lowest final loss.
An arm counts from its first loss after growth on, for the lowest final loss always. Schedules
and optimizers of a question are compared together. Reads finished runs only; see
`scripts.evidence`.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from scipy.stats import rankdata

from scripts.evidence import load_arms
from scripts.evidence_report import Arm, finished
from scripts.page import replace_table
from scripts.run_store import RunStore, StoredRun
from stackjax.analysis.settings import SAME_FLOPS
from stackjax.runtime.command_line import parse
from stackjax.runtime.constraints import Checked
from stackjax.runtime.errors import one_line_errors
from stackjax.runtime.ranges import Length
from stackjax.runtime.text_table import markdown_table

SHARES = (0.2, 0.3, 0.4, 0.6, 0.8, 0.9)
"""Shares of a run's FLOPs (6ND)."""
MIN_ARMS = 4
"""Fewer arms have no order worth a correlation."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EarlyLossesConfig(Checked):
    """Compares the order of early losses with the order of the last ones."""

    configs: Annotated[tuple[Path, ...], tyro.conf.Positional, Length(at_most=100)]
    """Config files with `get_arms()`."""
    output: Path = Path("docs/evidence")
    """Directory with finished runs."""
    page: Path | None = None
    """Page with markers for the table."""


def main() -> None:
    """Runs the command line."""
    with one_line_errors():
        options = parse(EarlyLossesConfig, prog="python -m scripts.early_losses")
        text = early_losses(options)
        if options.page is not None:
            replace_table(options.page, "early", text)
        print(text)


def early_losses(options: EarlyLossesConfig) -> str:
    """Returns the table in Markdown."""
    store = RunStore(options.output / "runs.jsonl")
    rows = []
    for path in options.configs:
        groups: list[list[Arm]] = []
        for arm in sorted(finished(load_arms(path), store), key=lambda arm: arm.flops_6nd):
            if not groups or arm.flops_6nd > (1 + SAME_FLOPS) * groups[-1][0].flops_6nd:
                groups.append([])
            groups[-1].append(arm)
        for arms in groups:
            if len(arms) >= MIN_ARMS:
                rows += _rows([path.stem, f"{arms[0].flops_6nd:.2e}"], arms)
    head = ["question", "FLOPs", "arms", "share of FLOPs", "rank correlation", "regret, nats"]
    return markdown_table(head, rows)


def _rows(group: list[str], arms: Sequence[Arm]) -> Iterator[list[str]]:
    finals = np.array([arm.losses.mean() for arm in arms])
    for share in SHARES:
        early = np.array([np.mean([loss_at(run, share) for run in arm.runs]) for arm in arms])
        known = ~np.isnan(early)
        if known.sum() < MIN_ARMS:
            continue
        correlation = np.corrcoef(rankdata(early[known]), rankdata(finals[known]))[0, 1]
        regret = finals[known][early[known].argmin()] - finals.min()
        yield [
            *group,
            str(known.sum()),
            f"{100 * share:.0f} %",
            f"{correlation:+.2f}",
            f"{regret:.3f}",
        ]


def loss_at(run: StoredRun, share: float) -> float:
    """Returns the loss at a share of the FLOPs (6ND); NaN before the final model's first loss.

    Losses between two evaluations are interpolated linearly.
    """
    grown = run.growths[-1][0] if run.growths else 0.0
    points = [(flops, loss) for tokens, flops, _, loss in run.evaluations if tokens > grown]
    flops, losses = zip(*points, strict=True)
    return float(np.interp(share * flops[-1], flops, losses, left=np.nan))


if __name__ == "__main__":
    main()
