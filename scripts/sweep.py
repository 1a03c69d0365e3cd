"""Runs a grid over growth timing, operator, factor and seed, and compares what came out.

    python -m scripts.sweep configs/bakeoff_tiny.py --tokens 1e5 2e5 4e5 --growths 'stack(4)'

All cells of a seed that start from the same small model branch off one run of it, and all cost
the same FLOPs, the small model included. What is finished is not run again, so the same command
goes on where it was stopped. `--dry-run` prints a command for each cell, for a job array.
"""

import dataclasses
import itertools
import math
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import tyro

from scripts.bakeoff import Jobs, run_all
from scripts.cells import check_phases
from stackjax.analysis.budget import cell
from stackjax.analysis.comparison_report import write as write_comparison
from stackjax.analysis.isoflop_report import write as write_isoflop
from stackjax.config import Config, Stage
from stackjax.config_file import read_config
from stackjax.growth import Growth, parse_growth
from stackjax.options import CompareConfig, IsoflopConfig
from stackjax.runtime.command_line import parse
from stackjax.runtime.constraints import Checked
from stackjax.runtime.errors import UserError, one_line_errors
from stackjax.runtime.numbers import Count, Positive, Seed, Text, Tokens
from stackjax.runtime.ranges import Length
from stackjax.training.expand import expand
from stackjax.training.stages import stage_models


@dataclasses.dataclass(frozen=True, kw_only=True)
class SweepConfig(Checked):
    """Runs a grid over growth timing, operator, factor and seed, and compares the cells."""

    config: Annotated[Path, tyro.conf.Positional]
    """A run of two stages, such as configs/bakeoff_tiny.py, whose last model is the target."""
    tokens: Annotated[tuple[Tokens, ...], Length(at_most=1000)]
    """Growth timings (d): tokens of the small model."""
    growths: Annotated[tuple[Text, ...], Length(at_most=1000)] = ("stack(4)",)
    """Operators, each with its factor."""
    seeds: Annotated[tuple[Seed, ...], Length(at_most=1000)] = (0, 1, 2)
    """Seeds of every cell, and of the run from scratch."""
    flops: Positive | None = None
    """FLOPs (6ND) of every run; by default those of the config's."""
    jobs: Jobs = 1
    """Runs at a time, which share the cores."""
    cell: Count | None = None
    """Run one cell alone, by its place in the grid."""
    dry_run: bool = False
    """Whether to print a command for each cell instead of running it."""


def main() -> None:
    """Runs the command line."""
    with one_line_errors():
        sweep(parse(SweepConfig, prog="python -m scripts.sweep"))


def sweep(options: SweepConfig) -> None:
    """Runs every cell and writes the comparison beside them.

    Raises:
      UserError: The grid and the config do not fit together.
    """
    runs = grid(options)
    check_phases(runs)
    if options.dry_run:
        given = [each for each in sys.argv[1:] if each != "--dry-run"]
        command = shlex.join(["python", "-m", "scripts.sweep", *given])
        for place in range(len(runs)):
            print(f"{command} --cell {place}")
        return
    if options.cell is not None:
        if options.cell >= len(runs):
            raise UserError(f"--cell is {options.cell}; the grid has 0 to {len(runs) - 1}.")
        runs = dict([list(runs.items())[options.cell]])
    run_all(runs, options.jobs)
    if options.cell is None:
        print(report(runs, Path(read_config(options.config).workdir) / "comparison"))


def grid(options: SweepConfig) -> dict[tuple[str, int], Config]:
    """Returns the config of every cell and of scratch, by name and seed."""
    config = read_config(options.config)
    _check(options, config)
    flops = options.flops or float(expand(config)[-1].end.flops_6nd)
    growths = {text: parse_growth(text) for text in options.growths}
    step_tokens = config.stages[0].batch_size * config.data.seq_len
    # Whole steps, so that a small model that goes on has seen what a shorter one has.
    steps = sorted({math.ceil(tokens / step_tokens) for tokens in options.tokens})
    timings = [count * step_tokens for count in steps]
    runs = {}
    for seed in options.seeds:
        for (text, growth), d in itertools.product(growths.items(), timings):
            small = _small_stages(config.stages[0], [each for each in timings if each <= d])
            stages, name = (*small, _last(config, growth)), f"{text}, {d} tokens"
            runs[name, seed] = _cell(config, name, stages, flops, seed)
        runs["scratch", seed] = _cell(config, "scratch", (_last(config, None),), flops, seed)
    return runs


def _check(options: SweepConfig, config: Config) -> None:
    if len(config.stages) != 2:
        raise UserError(
            f"{options.config} has {len(config.stages)} stages; a sweep needs two, the small "
            f"model's and the target's."
        )
    schedule = config.stages[0].schedule or config.optimizer.schedule
    if schedule.shape != "constant" and schedule.horizon_tokens is None:
        raise UserError(
            f"the schedule of stages.0 is {schedule.shape} and ends with its stage, so that a "
            f"small model would train otherwise for each timing; make it constant, or give it "
            f"horizon_tokens."
        )


def _small_stages(base: Stage, timings: Sequence[int]) -> list[Stage]:
    """Returns the stages of a small model up to the last timing, cut at each."""
    cuts = itertools.pairwise([0, *timings])
    return [dataclasses.replace(base, tokens=stop - start) for start, stop in cuts]


def _last(config: Config, growth: Growth | None) -> Stage:
    return dataclasses.replace(config.stages[-1], growth=growth)


def _cell(
    config: Config, name: str, stages: tuple[Stage, ...], flops: float, seed: int
) -> Config:
    """Returns the run of a cell, whose last stage is as long as the FLOPs allow."""
    target = stage_models(config)[-1]
    first = config.stages[0].schedule or config.optimizer.schedule
    # The small model's schedule does not begin again where its stages are cut.
    is_constant = first.shape == "constant" and not first.warmup_tokens
    of_run = first if is_constant else dataclasses.replace(first, axis="run")
    small = tuple(dataclasses.replace(stage, schedule=of_run) for stage in stages[:-1])
    run = dataclasses.replace(
        config, model=target, model_is="target", stages=(*small, stages[-1])
    )
    return cell(run, name, flops=flops, seed=seed)


def report(runs: Mapping[tuple[str, int], Config], output: Path) -> str:
    """Writes the comparison of all cells, and the best timings and factors; returns both."""
    paths = tuple(Path(config.workdir) for config in runs.values())
    compared = write_comparison(CompareConfig(runs=paths, output=output))
    found = write_isoflop(IsoflopConfig(runs=paths, output=output / "isoflop"))
    return f"{compared}\n\n{found}"


if __name__ == "__main__":
    main()
