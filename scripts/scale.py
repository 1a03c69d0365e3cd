"""Trains the runs of a config file at several sizes or lengths, and fits scaling laws.

    python -m scripts.scale configs/scaling_tiny.py --jobs 2

Finished runs are skipped, so the same command resumes. The output is the report of
`python -m stackjax.scale`.
"""

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from scripts.bakeoff import load_runs
from scripts.run_pool import Jobs, run_all
from stackjax.analysis.scaling_report import write
from stackjax.options import ScaleConfig
from stackjax.runtime.command_line import parse
from stackjax.runtime.constraints import Checked
from stackjax.runtime.errors import one_line_errors
from stackjax.runtime.numbers import Size


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(Checked):
    """Trains the runs of a config file at several sizes or lengths, and fits scaling laws."""

    config: Annotated[Path, tyro.conf.Positional]
    """A config file with `get_runs(seed)`, such as configs/scaling_tiny.py."""
    seeds: Size = 2
    """Seeds per run."""
    jobs: Jobs = 1
    """Concurrent runs; they share the cores."""
    output: Path | None = None
    """Directory for the report. The default is next to the run directories."""


def main() -> None:
    """Runs the command line."""
    with one_line_errors():
        print(scale(parse(Options, prog="python -m scripts.scale")))


def scale(options: Options) -> str:
    """Trains all runs and writes the report; returns its Markdown."""
    get_runs = load_runs(options.config)
    runs = {
        (name, seed): config
        for seed in range(options.seeds)
        for name, config in get_runs(seed).items()
    }
    run_all(runs, options.jobs)
    paths = tuple(Path(config.workdir) for config in runs.values())
    output = options.output or paths[0].parent.parent / "laws"
    return write(ScaleConfig(runs=paths, output=output))


if __name__ == "__main__":
    main()
