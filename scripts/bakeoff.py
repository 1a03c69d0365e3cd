"""Trains the runs of a config file, and writes a table and a figure of held-out losses.

    python -m scripts.bakeoff configs/bakeoff_tiny.py

Runs with equal first stages share them. Finished runs are skipped, so the same command resumes.
The best three runs and scratch are then repeated with more seeds.
"""

import contextlib
import dataclasses
import itertools
import multiprocessing
import os
import shlex
import shutil
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Annotated

import tyro
from etils import epath

from scripts.cells import Cells, check_cells, check_phases
from scripts.results import best, draw, final_loss, table
from stackjax.config import Config
from stackjax.config_file import flatten
from stackjax.config_record import RECORD, config_record, read_config_record
from stackjax.files.json_file import hash_of
from stackjax.files.output import check_writable
from stackjax.files.python_file import load_function
from stackjax.run.train import train
from stackjax.runtime.command_line import parse
from stackjax.runtime.constraints import Checked, OnlyWith
from stackjax.runtime.cpu_memory import keep_memory
from stackjax.runtime.errors import UserError, one_line_errors
from stackjax.runtime.numbers import Seed, Size, Text
from stackjax.runtime.ranges import Whole, show
from stackjax.training.expand import expand
from stackjax.training.run_history import NEW_RUN, after_entering, write_history
from stackjax.training.stages import stage_models, stage_seq_lens

BEST = 3

Jobs = Annotated[int, Whole(at_least=1, at_most=1000)]
"""How many runs train at a time."""


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


def run_all(runs: Cells, jobs: int) -> None:
    """Trains every unfinished run, by name and seed.

    Equal first stages, up to the first growth, are trained only once. If a run's first stages
    continue another run's, the longer sequence is trained. A run with longer sequences after
    growth has its own first stages, because the order of its data follows from the longest.

    Raises:
      UserError: A run cannot start or resume, and nothing was trained; or some runs failed.
    """
    # With a source model, a run and its first stages differ only in later stages.
    runs = {
        label: dataclasses.replace(config, model=stage_models(config)[0], model_is="source")
        for label, config in runs.items()
    }
    grown = [config for config in runs.values() if _shares_first_stages(config)]
    missing = [config for config in grown if not Path(config.workdir).exists()]
    bases = sorted(map(_base, missing), key=lambda base: -len(base.stages))
    trunks = {
        config.workdir: next(base for base in bases if _begins(base, config))
        for config in missing
    }
    shared = {trunk.workdir: trunk for trunk in trunks.values()}
    begun = {(f"the first stages, in {path}", run.seed): run for path, run in shared.items()}
    _check_apart({**runs, **begun})
    _train_each(shared, jobs)
    for config in missing:
        _branch(trunks[config.workdir], config)
    _train_each({f"{name}, seed {seed}": run for (name, seed), run in runs.items()}, jobs)


def _shares_first_stages(config: Config) -> bool:
    """Returns whether a run grows and its first stages read the same data without the rest."""
    if not any(stage.growth for stage in config.stages):
        return False
    return max(stage_seq_lens(_base(config))) == max(stage_seq_lens(config))


def _base(config: Config) -> Config:
    """Returns a run with only the stages before the first growth."""
    stages = tuple(itertools.takewhile(lambda stage: stage.growth is None, config.stages))
    base = dataclasses.replace(config, stages=stages, workdir="base")
    size = f"{config.model.num_layers}x{config.model.embed_dim}"
    lengths = "-".join(str(stage.tokens) for stage in stages)
    # Bases of the same size and length differ elsewhere, such as in weights of sources.
    name = f"base-{size}-{lengths}-seed_{config.seed}-{hash_of(flatten(base))[:8]}"
    return dataclasses.replace(base, workdir=str(Path(config.workdir).parent / name))


def _begins(trunk: Config, config: Config) -> bool:
    """Returns whether a trunk includes a run's first stages."""
    base = _base(config)
    cut = dataclasses.replace(trunk, stages=trunk.stages[: len(base.stages)])
    return dataclasses.replace(cut, workdir=base.workdir) == base


def _branch(trunk: Config, config: Config) -> None:
    """Makes a run directory with the first stages copied from a trunk."""
    last = len(_base(config).stages) - 1
    source, workdir = epath.Path(trunk.workdir), epath.Path(config.workdir)
    partial = workdir.with_name(f"{workdir.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    (source / "metrics.jsonl").copy(partial / "metrics.jsonl")
    # Shared stages are equal in this run's config.
    record = {**read_config_record(source / RECORD), "config": flatten(config)}
    (partial / RECORD).write_text(config_record(record))
    for stage in range(last + 1):
        shutil.copytree(source / f"stage_{stage}", partial / f"stage_{stage}")
    # A resumed run drops later rows.
    end = next(phase for phase in reversed(expand(trunk)) if phase.stage == last)
    write_history(partial, after_entering(NEW_RUN, None, end))
    partial.rename(workdir)


def _train_each(configs: Mapping[str, Config], jobs: int) -> None:
    """Trains runs in parallel jobs, each on separate cores."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    context = multiprocessing.get_context("spawn")
    shares = context.Queue()
    for job in range(jobs):
        shares.put(cores[job::jobs])
    with ProcessPoolExecutor(jobs, context, _take_cores, (shares,)) as pool:
        ends = {pool.submit(_train, config): name for name, config in configs.items()}
        failed = []
        try:
            for place, end in enumerate(as_completed(ends), 1):
                has_failed, said = _outcome(end)
                failed += [ends[end]] if has_failed else []
                print(f"[{place}/{len(ends)}] {ends[end]}: {said}", flush=True)
        finally:
            pool.shutdown(cancel_futures=True)
    if failed:
        raise UserError(
            f"{len(failed)} of {len(ends)} runs failed, for the reasons above: "
            f"{'; '.join(failed)}. Finished runs are kept; the same command resumes."
        )


def _outcome(end: "Future[float]") -> tuple[bool, str]:
    """Returns whether a run has failed, and the loss or the reason; bugs are raised."""
    try:
        return False, f"held-out loss {end.result():.4f}"
    except (UserError, OSError, FloatingPointError) as error:
        return True, f"failed: {' '.join(str(error).splitlines())}"


def _check_apart(runs: Cells) -> None:
    """Checks every run in a separate process, which then releases the devices."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context) as pool:
        pool.submit(check_cells, dict(runs)).result()


def _take_cores(shares: "multiprocessing.Queue[list[int]]") -> None:
    # Before JAX starts a thread per core.
    share = shares.get()
    if share:
        os.sched_setaffinity(0, share)


def _train(config: Config) -> float:
    """Trains a run with output in a log file; returns the final held-out loss."""
    workdir = Path(config.workdir)
    workdir.parent.mkdir(parents=True, exist_ok=True)
    keep_memory()
    with open(f"{workdir}.log", "a") as log, contextlib.redirect_stdout(log):
        train(config)
    return final_loss(config)


if __name__ == "__main__":
    main()
