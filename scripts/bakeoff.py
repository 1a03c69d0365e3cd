"""Trains the runs of a config file, and writes a table and a figure of held-out losses.

    python -m scripts.bakeoff configs/bakeoff_tiny.py

Runs with equal first stages share them. Finished runs are skipped, so the same command resumes.
The best three runs and scratch are then repeated with more seeds.
"""

import dataclasses
import shlex
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated

import tyro

from scripts.cells import Cells, check_phases
from scripts.results import best, draw, table
from scripts.run_pool import Jobs, run_all
from stackjax.config import Config
from stackjax.files.output import check_writable
from stackjax.files.python_file import load_function
from stackjax.runtime.command_line import parse
from stackjax.runtime.constraints import Checked, OnlyWith
from stackjax.runtime.errors import UserError, one_line_errors
from stackjax.runtime.numbers import Seed, Size, Text
from stackjax.runtime.ranges import show

BEST = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class BakeoffConfig(Checked):
    """Trains the runs of a config file, and writes a table and a figure of held-out losses."""

    config: Annotated[Path, tyro.conf.Positional]
    """A config file with `get_runs(seed)`, such as configs/bakeoff_tiny.py."""
    seeds: Size = 3
    """Seeds for the best three runs and scratch."""
    jobs: Jobs = 1
    """Concurrent runs; they share the cores. Two runs on two cores take a quarter less time."""
    output: Path | None = None
    """Table (.md), with a figure next to it. The default is next to the run directories."""
    only: Text | None = None
    """Train only the run with this name; no table or figure."""
    seed: Annotated[Seed, OnlyWith("only")] = 0
    """Seed for `only`."""
    dry_run: bool = False
    """Print a command for each run instead of training."""


def main() -> None:
    """Runs the command line."""
    with one_line_errors():
        bake(parse(BakeoffConfig, prog="python -m scripts.bakeoff"))


def bake(options: BakeoffConfig) -> None:
    """Trains all runs, and writes table and figure."""
    get_runs = load_runs(options.config)
    runs = {(name, 0): config for name, config in get_runs(0).items()}
    check_phases(runs)
    if options.dry_run:
        for name, _ in runs:
            parts = ["python", "-m", "scripts.bakeoff", str(options.config), "--only", name]
            print(shlex.join(parts))
        return
    if options.only is not None:
        if (options.only, 0) not in runs:
            known = "; ".join(name for name, _ in runs)
            raise UserError(f"--only is {options.only!r}; it must be a run: {known}.")
        of_seed = get_runs(options.seed)
        _check_same(options.config, runs, {options.seed: of_seed})
        run_all({(options.only, options.seed): of_seed[options.only]}, options.jobs)
        return
    start, seeds = time.monotonic(), range(1, options.seeds)
    all_runs = {seed: get_runs(seed) for seed in seeds}
    first = next(iter(runs.values()))
    output = options.output or Path(first.workdir).parent / "table.md"
    _check_same(options.config, runs, all_runs)
    output.parent.mkdir(parents=True, exist_ok=True)
    check_writable("output", output)
    run_all(runs, options.jobs)
    names = best(runs, BEST)
    for seed, of_seed in all_runs.items():
        more = {(name, seed): of_seed[name] for name in names}
        run_all(more, options.jobs)
        runs |= more
    output.write_text(table(runs))
    draw(runs, output.with_suffix(".png"))
    print(output.read_text())
    print(f"{output} and its .png; {(time.monotonic() - start) / 60:.0f} minutes")


def _check_same(file: Path, runs: Cells, others: Mapping[int, Mapping[str, Config]]) -> None:
    """Raises UserError if a run has no config for another seed."""
    for seed, of_seed in others.items():
        if missing := [name for name, _ in runs if name not in of_seed]:
            raise UserError(
                f"{file}: get_runs({seed}) lacks {missing[0]!r}, a run of get_runs(0)."
            )


def load_runs(path: Path) -> Callable[[int], dict[str, Config]]:
    """Returns a function from seed to runs; UserError if the file has none."""
    get_runs = load_function(path, "get_runs")
    if get_runs is None:
        raise UserError(f"{path} has no get_runs(seed); use stackjax.train for a single run.")

    def runs_of(seed: int) -> dict[str, Config]:
        runs = get_runs(seed)
        if not isinstance(runs, dict) or not runs:
            raise UserError(f"{path}: get_runs({seed}) must return a dictionary of configs.")
        for name, config in runs.items():
            if not isinstance(name, str) or not isinstance(config, Config):
                raise UserError(
                    f"{path}: get_runs({seed}) has {show(name)}: {show(config)}; it must "
                    f"map names to stackjax.config.Config."
                )
        return runs

    return runs_of


if __name__ == "__main__":
    main()
