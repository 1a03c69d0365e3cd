"""Table and picture of tuned runs."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from scripts.run_store import RunStore, StoredRun, provenance
from stackjax.analysis.plots import sign
from stackjax.analysis.speedup import Estimate, difference, t_margin
from stackjax.analysis.tables import markdown
from stackjax.config import Config
from stackjax.runtime.errors import UserError
from stackjax.runtime.text_table import markdown_table

Labels = tuple[tuple[str, str], ...]
"""Names and values of an arm; the first is the run, the last the group."""
SCRATCH = "scratch"


@dataclasses.dataclass(frozen=True)
class Arm:
    """An arm's finished runs."""

    labels: Labels
    tuning: Mapping[float, float]
    """Losses by learning rate, with the seed for tuning."""
    rate: float
    """The best learning rate."""
    runs: Sequence[StoredRun]
    """Runs at the best learning rate, with fresh seeds."""
    device_seconds: float
    """Of the fastest run at any rate; others may have shared their cores."""

    @property
    def losses(self) -> np.ndarray:
        """Final held-out losses of the fresh seeds."""
        return np.array([run.loss for run in self.runs])

    @property
    def flops_6nd(self) -> float:
        """FLOPs (6ND) of a run."""
        return self.runs[0].evaluations[-1][1]

    @property
    def values(self) -> dict[str, str]:
        """Values of the labels, by name."""
        return dict(self.labels)


def finished(arms: Mapping[Labels, Config], store: RunStore) -> list[Arm]:
    """Returns the arms with a best learning rate and fresh seeds.

    Raises:
      UserError: Runs have read different data.
    """
    found = []
    for labels, config in arms.items():
        runs = store.runs(config)
        tuning = {rate: run.loss for (rate, seed), run in runs.items() if not seed}
        if not tuning:
            continue
        rate = best_rate(tuning)
        fresh = [run for (at, seed), run in sorted(runs.items()) if seed and at == rate]
        if fresh:
            fastest = min(run.device_seconds for run in runs.values() if not run.diverged)
            found.append(Arm(labels, tuning, rate, fresh, fastest))
    data = {run.data[:12] for arm in found for run in arm.runs}
    if len(data) > 1:
        raise UserError(
            f"the runs of this question read different data, {' and '.join(sorted(data))}; "
            f"remove the lines of one from runs.jsonl, or give another --output."
        )
    return found


def best_rate(losses: Mapping[float, float]) -> float:
    """Returns the learning rate with the lowest loss; of equal ones, the lowest rate."""
    return min(sorted(losses), key=losses.__getitem__)


def scratch_of(arm: Arm, arms: Sequence[Arm]) -> Arm | None:
    """Returns the arm from scratch with the same labels; an empty label fits any value."""
    for other in arms:
        (_, run), *labels = other.labels
        if run == SCRATCH and all(not at or arm.values[name] == at for name, at in labels):
            return other
    return None


def table(arms: Sequence[Arm]) -> str:
    """Returns the table in Markdown, and the provenance."""
    rows = []
    for arm in arms:
        scratch = scratch_of(arm, arms)
        cells = [markdown(value) for _, value in arm.labels]
        cells += [f"{arm.rate:g}", *_neighbors(arm), _mean(arm.losses)]
        if scratch is None or scratch is arm:
            cells += ["", ""]
        else:
            gap = difference(arm.losses, scratch.losses)
            cells += [_signed(gap), _saved(gap, arm, scratch, arms)]
        tokens, _, flops, _ = arm.runs[0].evaluations[-1]
        cells += [f"{tokens:.3g}", f"{flops:.3g}", f"{arm.device_seconds:.0f}"]
        rows.append(cells)
    head = [
        *(name for name, _ in arms[0].labels),
        "best rate",
        "at half the rate",
        "at twice the rate",
        "held-out loss",
        "minus scratch",
        "FLOPs saved",
        "tokens",
        "matmul FLOPs",
        "device-seconds",
    ]
    below = "\n".join(f"- {line}" for line in _trace(arms))
    return f"{markdown_table(head, rows)}\n\n{below}"


def _neighbors(arm: Arm) -> list[str]:
    """Returns the losses at half and twice the best rate, minus the loss at the best rate."""
    best = arm.tuning[arm.rate]
    near = (arm.tuning.get(arm.rate / 2), arm.tuning.get(2 * arm.rate))
    return ["" if loss is None else f"{loss - best:+.3f}" for loss in near]


def _mean(losses: np.ndarray) -> str:
    if len(losses) < 2:
        return f"{losses.mean():.4f}"
    margin = t_margin(float(losses.var(ddof=1)) / len(losses), len(losses) - 1)
    return f"{losses.mean():.4f} ± {margin:.3f}"


def _signed(gap: Estimate) -> str:
    interval = "" if gap.low is None else f" [{gap.low:+.3f}, {gap.high:+.3f}]"
    return f"{gap.value:+.3f}{interval}"


def _saved(gap: Estimate, arm: Arm, scratch: Arm, arms: Sequence[Arm]) -> str:
    """Returns the share of FLOPs (6ND) saved at the arm's loss, from scratch's other lengths.

    Between two lengths, the loss from scratch is a power law of FLOPs. Beyond the first and the
    last length, the law continues; such shares are marked with ~. The interval is that of the
    gap; scratch's curve counts as exact. Empty if the curve does not fall.
    """
    group, _ = arm.labels[-1]
    others = {name: at for name, at in scratch.labels if name != group}
    lengths = sorted(
        (other for other in arms if {**other.values, group: ""} == {**others, group: ""}),
        key=lambda other: other.flops_6nd,
    )
    if len(lengths) < 2:
        return ""
    flops = np.log([other.flops_6nd for other in lengths])
    losses = np.log([other.losses.mean() for other in lengths])
    if np.any(np.diff(losses) >= 0):
        return ""

    def share(loss: float) -> float:
        place = int(np.clip(np.searchsorted(-losses, -math.log(loss)), 1, len(losses) - 1))
        slope = (flops[place] - flops[place - 1]) / (losses[place] - losses[place - 1])
        at = flops[place - 1] + slope * (math.log(loss) - losses[place - 1])
        return 1 - arm.flops_6nd / math.exp(at)

    mean = float(scratch.losses.mean())
    ends = [share(mean + each) for each in (gap.high, gap.low) if each is not None]
    interval = f" [{', '.join(f'{100 * end:.0f}' for end in ends)}]" if ends else ""
    beyond = "" if losses[-1] <= math.log(mean + gap.value) <= losses[0] else "~ "
    return f"{beyond}{100 * share(mean + gap.value):.0f} %{interval}"


def draw(arms: Sequence[Arm], output: Path) -> None:
    """Draws each arm's loss minus scratch's, by group."""
    groups = list(dict.fromkeys(arm.labels[-1][1] for arm in arms))
    names = list(dict.fromkeys(arm.labels[:-1] for arm in arms if arm.labels[0][1] != SCRATCH))
    figure, plot = plt.subplots(figsize=(8, 4.5), dpi=150)
    figure.set_layout_engine("constrained")
    for place, name in enumerate(names):
        points = []
        for arm in arms:
            scratch = scratch_of(arm, arms)
            if arm.labels[:-1] == name and scratch is not None:
                gap = difference(arm.losses, scratch.losses)
                margin = 0.0 if gap.high is None else gap.high - gap.value
                points.append((groups.index(arm.labels[-1][1]), gap.value, margin))
        if points:
            shift = 0.6 * ((place + 0.5) / len(names) - 0.5)
            x, y, margin = zip(*points, strict=True)
            label = ", ".join(value for _, value in name if value)
            plot.errorbar(np.array(x) + shift, y, margin, fmt="o", capsize=3, label=label)
    plot.axhline(0, color="black", lw=1)
    plot.set_xticks(range(len(groups)), groups)
    plot.set_xlim(-0.5, len(groups) - 0.5)
    plot.set_xlabel(arms[0].labels[-1][0])
    plot.set_ylabel("held-out loss minus scratch, nats per token")
    plot.grid(axis="y", alpha=0.25)
    plot.spines[["top", "right"]].set_visible(False)
    plot.legend(frameon=False, fontsize=8)
    sign(figure, _trace(arms)).savefig(output)
    plt.close(figure)


def _trace(arms: Sequence[Arm]) -> list[str]:
    """Returns the provenance as lines."""
    runs = [run for arm in arms for run in arm.runs]
    counts = [len(arm.tuning) + len(arm.runs) for arm in arms]
    seconds = sum(arm.device_seconds * n for arm, n in zip(arms, counts, strict=True))
    seeds = sorted({len(arm.runs) for arm in arms})
    return [
        f"seeds at the best rate: {' or '.join(map(str, seeds))}, besides the one for tuning",
        f"{sum(counts)} runs, {seconds / 3600:.1f} device-hours at the speed of each arm's "
        f"fastest run, without compilation and evaluation",
        provenance(runs),
    ]
