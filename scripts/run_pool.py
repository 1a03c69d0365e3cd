"""Trains many runs, several at a time; equal first stages are trained once."""

import contextlib
import dataclasses
import itertools
import multiprocessing
import os
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Annotated

from etils import epath

from scripts.cells import Cells, check_cells
from scripts.results import final_loss
from stackjax.config import Config
from stackjax.config_file import flatten
from stackjax.config_record import RECORD, config_record, read_config_record
from stackjax.files.json_file import hash_of
from stackjax.run.train import train
from stackjax.runtime.cpu_memory import keep_memory
from stackjax.runtime.errors import UserError
from stackjax.runtime.ranges import Whole
from stackjax.training.expand import expand
from stackjax.training.run_history import NEW_RUN, after_entering, write_history
from stackjax.training.stages import stage_models, stage_seq_lens

Jobs = Annotated[int, Whole(at_least=1, at_most=1000)]
"""How many runs train at a time."""


def run_all(runs: Cells, jobs: int) -> None:
    """Trains every unfinished run; see `train_all`. A run that diverges has failed."""
    for _ in train_all(runs, jobs):
        pass


def train_all(
    runs: Cells, jobs: int, *, may_diverge: bool = False
) -> Iterator[tuple[tuple[str, int], bool]]:
    """Trains every unfinished run; yields each label at its end, and whether the run diverged.

    Equal first stages, up to the first growth, are trained only once. If a run's first stages
    continue another run's, the longer sequence is trained. A run with longer sequences after
    growth has its own first stages, because the order of its data follows from the longest.

    Args:
      runs: Configs by name and seed.
      may_diverge: Whether a run whose loss becomes NaN or infinite has ended, not failed.

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
    ended = dict(_train_each(shared, jobs, may_diverge))
    for config in missing:
        trunk = trunks[config.workdir]
        if not ended[trunk.workdir]:  # else the run itself diverges, in its own directory
            _branch(trunk, config)
    labels = {f"{name}, seed {seed}": (name, seed) for name, seed in runs}
    named = {text: runs[label] for text, label in labels.items()}
    for text, has_diverged in _train_each(named, jobs, may_diverge):
        yield labels[text], has_diverged


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


def _train_each(
    configs: Mapping[str, Config], jobs: int, may_diverge: bool
) -> Iterator[tuple[str, bool]]:
    """Trains runs in parallel jobs, each on separate cores.

    Yields each name at its run's end, and whether the run diverged.
    """
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
                outcome, said = _outcome(end)
                print(f"[{place}/{len(ends)}] {ends[end]}: {outcome} {said}", flush=True)
                if outcome == "failed:" or (outcome == "diverged:" and not may_diverge):
                    failed.append(ends[end])
                else:
                    yield ends[end], outcome == "diverged:"
        finally:
            pool.shutdown(cancel_futures=True)
    if failed:
        raise UserError(
            f"{len(failed)} of {len(ends)} runs failed, for the reasons above: "
            f"{'; '.join(failed)}. Finished runs are kept; the same command resumes."
        )


def _outcome(end: "Future[float]") -> tuple[str, str]:
    """Returns how a run ended, and the loss or the reason; bugs are raised."""
    try:
        return "held-out loss", f"{end.result():.4f}"
    except FloatingPointError as error:
        return "diverged:", " ".join(str(error).splitlines())
    except (UserError, OSError) as error:
        return "failed:", " ".join(str(error).splitlines())


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
