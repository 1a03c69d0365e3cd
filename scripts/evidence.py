"""Answers a question with tuned runs: learning rates for each arm, then fresh seeds.

    python -m scripts.evidence configs/evidence/length.py --jobs 2

An arm is a config. Its learning rate is tuned with seed 0: three rates, a factor of 2 apart,
and more rates until the best one has a worse neighbor on both sides; a run that diverges has an
infinite loss. The best rate then trains with seeds 1, 2, ..., and only these are in the table.
Arms of a group, such as a length, are finished before the next group begins.

Finished runs are kept as data in the output directory, by default docs/evidence, and are not
trained again, so the same command resumes. `--report` only writes table and picture.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated

import tyro

from scripts.cells import check_phases
from scripts.evidence_report import Labels, best_rate, draw, finished, table
from scripts.page import check_page, write_table
from scripts.run_pool import Jobs, train_all
from scripts.run_store import RunStore
from stackjax.config import Config
from stackjax.files.output import check_output_directory
from stackjax.files.python_file import load_function
from stackjax.runtime.command_line import parse
from stackjax.runtime.constraints import Checked
from stackjax.runtime.errors import UserError, one_line_errors
from stackjax.runtime.ranges import Whole


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvidenceConfig(Checked):
    """Answers a question with tuned runs: learning rates for each arm, then fresh seeds."""

    config: Annotated[Path, tyro.conf.Positional]
    """A config file with `get_arms()`, such as configs/evidence/length.py."""
    seeds: Annotated[int, Whole(at_least=1, at_most=100)] = 3
    """Seeds at each arm's best learning rate, besides the seed for tuning."""
    jobs: Jobs = 1
    """Concurrent runs; they share the cores."""
    output: Path = Path("docs/evidence")
    """Directory for finished runs and pictures."""
    page: Path | None = None
    """Page with markers for the table; by default NAME.md in the output directory."""
    report: bool = False
    """Only write table and picture."""


def main() -> None:
    """Runs the command line."""
    with one_line_errors():
        answer(parse(EvidenceConfig, prog="python -m scripts.evidence"))


def answer(options: EvidenceConfig) -> None:
    """Trains what is missing, and writes table and picture after each group.

    Raises:
      UserError: An arm cannot train, or a run has failed.
    """
    arms = load_arms(options.config)
    check_phases({(_text(labels), 0): arm for labels, arm in arms.items()})
    check_output_directory("output", options.output)
    check_page(options.config.stem, options.page)
    options.output.mkdir(parents=True, exist_ok=True)
    store = RunStore(options.output / "runs.jsonl")
    if options.report:
        _report(options, arms, store)
        return
    for group in dict.fromkeys(labels[-1] for labels in arms):
        of_group = {labels: arm for labels, arm in arms.items() if labels[-1] == group}
        while missing := dict(_missing(of_group, store, options.seeds)):
            for label, diverged in train_all(missing, options.jobs, may_diverge=True):
                store.add(missing[label], diverged=diverged)
        _report(options, arms, store)


def _report(options: EvidenceConfig, arms: Mapping[Labels, Config], store: RunStore) -> None:
    """Writes table and picture of the finished arms, and prints the table."""
    known = finished(arms, store)
    if not known:
        print("no arm is finished")
        return
    name = options.config.stem
    write_table(table(known), name, options.output, options.page)
    draw(known, options.output / f"{name}.png")


def load_arms(path: Path) -> dict[Labels, Config]:
    """Returns the arms of a config file, by labels.

    Raises:
      UserError: The file has no arms, or two arms have the same labels.
    """
    get_arms = load_function(path, "get_arms")
    if get_arms is None:
        raise UserError(f"{path} has no get_arms(); use scripts.bakeoff for get_runs(seed).")
    arms: dict[Labels, Config] = {}
    for labels, config in get_arms():
        key = tuple(labels.items())
        if key in arms:
            raise UserError(f"{path}: get_arms() has two arms {_text(key)}.")
        arms[key] = config
    return arms


def _missing(
    arms: Mapping[Labels, Config], store: RunStore, seeds: int
) -> Iterator[tuple[tuple[str, int], Config]]:
    """Returns the next runs to train, by name and seed; none if all arms are finished."""
    for labels, arm in arms.items():
        done = store.runs(arm)
        tuning = {rate: run.loss for (rate, seed), run in done.items() if not seed}
        rates = next_rates(tuning, arm.optimizer.peak_learning_rate)
        wanted = [(rate, 0) for rate in rates] or [
            (best_rate(tuning), seed) for seed in range(1, seeds + 1)
        ]
        for rate, seed in wanted:
            if (rate, seed) not in done:
                name = f"{_text(labels)}, rate {rate:g}"
                yield (name, seed), _run(arm, name, rate, seed)


def next_rates(losses: Mapping[float, float], first: float) -> list[float]:
    """Returns the learning rates to try next; none if the best one has both neighbors.

    Args:
      losses: Losses of the rates tried.
      first: The first rate to try, with its neighbors.
    """
    best = best_rate(losses) if losses else first
    return [rate for rate in (best / 2, best, 2 * best) if rate not in losses]


def _run(arm: Config, name: str, rate: float, seed: int) -> Config:
    slug = re.sub(r"[^\w.,=()+-]", "_", name.replace(", ", "-"))
    return dataclasses.replace(
        arm,
        optimizer=dataclasses.replace(arm.optimizer, peak_learning_rate=rate),
        seed=seed,
        workdir=f"{arm.workdir}/{slug}-seed_{seed}",
    )


def _text(labels: Labels) -> str:
    return ", ".join(value for _, value in labels if value)


if __name__ == "__main__":
    main()
