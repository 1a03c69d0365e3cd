"""Trains a grid over growth timing, operator, factor and seed, and compares the runs.

    python -m scripts.sweep configs/bakeoff_tiny.py --tokens 1e5 2e5 4e5 --growths 'stack(4)'

All cells with the same seed and small model branch off the same run. All cells have
equal FLOPs, including the small model. Finished runs are skipped, so the same command
resumes. `--dry-run` prints a command for each cell, for a job array.
"""

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import tyro

from scripts.cells import check_phases, pick, print_commands
from scripts.run_pool import Jobs, run_all
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
from stackjax.training.stages import stage_models, stage_seq_lens


@dataclasses.dataclass(frozen=True, kw_only=True)
class SweepConfig(Checked):
    """Trains a grid over growth timing, operator, factor and seed, and compares the runs."""

    config: Annotated[Path, tyro.conf.Positional]
    """A two-stage run, such as configs/bakeoff_tiny.py; the last model is the target."""
    tokens: Annotated[tuple[Tokens, ...], Length(at_most=1000)]
    """Growth timings: tokens before growth (d)."""
    growths: Annotated[tuple[Text, ...], Length(at_most=1000)] = ("stack(4)",)
    """Operators with factors."""
    seeds: Annotated[tuple[Seed, ...], Length(at_most=1000)] = (0, 1, 2)
    """Seeds for every cell and scratch."""
    flops: Positive | None = None
    """FLOPs (6ND) per run; by default the config's."""
    jobs: Jobs = 1
    """Concurrent runs; they share the cores."""
    cell: Count | None = None
    """Train only this cell, by index."""
    dry_run: bool = False
    """Print a command for each cell instead of training."""


def main() -> None:
    """Runs the command line."""
    with one_line_errors():
        sweep(parse(SweepConfig, prog="python -m scripts.sweep"))


def sweep(options: SweepConfig) -> None:
    """Trains every cell, and writes the comparison.

    Raises:
      UserError: The grid and the config do not fit together.
    """
    runs = grid(options)
    check_phases(runs)
    if options.dry_run:
        print_commands("scripts.sweep", len(runs))
        return
    if options.cell is not None:
        runs = pick(runs, options.cell)
    run_all(runs, options.jobs)
    if options.cell is None:
        print(report(runs, Path(read_config(options.config).workdir) / "comparison"))


def grid(options: SweepConfig) -> dict[tuple[str, int], Config]:
    """Returns the configs of all cells and scratch, by name and seed."""
    config = read_config(options.config)
    _check(options, config)
    flops = options.flops or float(expand(config)[-1].end.flops_6nd)
    growths = {text: parse_growth(text) for text in options.growths}
    step_tokens = config.stages[0].batch_size * stage_seq_lens(config)[0]
    # Whole steps, so all timings share a prefix of the data.
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
            f"{options.config} has {len(config.stages)} stages; a sweep needs 2: small model "
            f"and target."
        )
    schedule = config.stages[0].schedule or config.optimizer.schedule
    if schedule.shape != "constant" and schedule.horizon_tokens is None:
        raise UserError(
            f"the schedule of stages.0 is {schedule.shape} without horizon_tokens, so it "
            f"depends on the growth timing; make it constant, or set horizon_tokens."
        )


def _small_stages(base: Stage, timings: Sequence[int]) -> list[Stage]:
    """Returns the small model's stages, cut at each timing."""
    cuts = itertools.pairwise([0, *timings])
    return [dataclasses.replace(base, tokens=stop - start) for start, stop in cuts]


def _last(config: Config, growth: Growth | None) -> Stage:
    return dataclasses.replace(config.stages[-1], growth=growth)


def _cell(
    config: Config, name: str, stages: tuple[Stage, ...], flops: float, seed: int
) -> Config:
    """Returns a cell's run, with the last stage cut to the budget."""
    target = stage_models(config)[-1]
    first = config.stages[0].schedule or config.optimizer.schedule
    # The small model's schedule continues across its stages.
    is_constant = first.shape == "constant" and not first.warmup_tokens
    of_run = first if is_constant else dataclasses.replace(first, axis="run")
    small = tuple(dataclasses.replace(stage, schedule=of_run) for stage in stages[:-1])
    run = dataclasses.replace(
        config, model=target, model_is="target", stages=(*small, stages[-1])
    )
    return cell(run, name, flops=flops, seed=seed)


def report(runs: Mapping[tuple[str, int], Config], output: Path) -> str:
    """Writes and returns the comparison, and the best timings and factors."""
    paths = tuple(Path(config.workdir) for config in runs.values())
    compared = write_comparison(CompareConfig(runs=paths, output=output))
    found = write_isoflop(IsoflopConfig(runs=paths, output=output / "isoflop"))
    return f"{compared}\n\n{found}"


if __name__ == "__main__":
    main()
