"""Runs what a config file lists at several sizes or lengths, and fits the laws.

    python -m scripts.scale configs/scaling_tiny.py --jobs 2

What is finished is not run again, so the same command goes on where it was stopped. It ends in
what `python -m stackjax.scale` writes.
"""

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from scripts.bakeoff import Jobs, load_runs, run_all
from stackjax.analysis.scaling_report import write
from stackjax.options import ScaleConfig
from stackjax.runtime.command_line import parse
from stackjax.runtime.constraints import Checked
from stackjax.runtime.errors import one_line_errors
from stackjax.runtime.numbers import Size


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(Checked):
    """Runs what a config file lists at several sizes or lengths, and fits the laws."""

    config: Annotated[Path, tyro.conf.Positional]
    """A config file with `get_runs(seed)`, such as configs/scaling_tiny.py."""
    seeds: Size = 2
    """Seeds of every run."""
    jobs: Jobs = 1
    """Runs at a time, which share the cores."""
    output: Path | None = None
    """Directory of what is written; by default beside the directories of the runs."""


def main() -> None:
    """Runs the command line."""
    with one_line_errors():
        print(scale(parse(Options, prog="python -m scripts.scale")))


def scale(options: Options) -> str:
    """Runs everything and writes the laws, which it returns as Markdown."""
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
