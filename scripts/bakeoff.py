"""Runs what a config file compares, and tables and draws the held-out losses.

    python -m scripts.bakeoff configs/bakeoff_tiny.py

Runs that start with the same first stage share it. What is finished is not run again, so the
same command goes on where it was stopped. Where runs are grown at several timings, more seeds
are run of the best three of each and of the run from scratch.
"""

import dataclasses
import importlib.util
import shlex
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated

import matplotlib.pyplot as plt
import tyro

from stackjax import distributed
from stackjax.config import Config
from stackjax.errors import one_line_errors
from stackjax.metrics import read_rows
from stackjax.phases import stage_models
from stackjax.train import train

BEST = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class BakeoffConfig:
    """Runs what a config file compares, and tables and draws the held-out losses."""

    config: Annotated[Path, tyro.conf.Positional]
    """A config file with `get_runs(seed)`, such as configs/bakeoff_tiny.py."""
    seeds: int = 3
    """Seeds of the best three of each growth timing, and of the run from scratch."""
    output: Path | None = None
    """Table (.md) to write, and picture beside it; by default in the directory of the runs."""
    only: str | None = None
    """Run by this name alone, with neither table nor picture."""
    seed: int = 0
    """Seed of the one run."""
    dry_run: bool = False
    """Whether to print a command for each run instead of running it."""


def main() -> None:
    """Runs the command line."""
    with one_line_errors():
        distributed.initialize()
        bake(tyro.cli(BakeoffConfig, prog="python -m scripts.bakeoff", args=sys.argv[1:]))


def bake(options: BakeoffConfig) -> None:
    """Runs everything and writes table and picture."""
    get_runs = load_runs(options.config)
    runs = {(name, 0): config for name, config in get_runs(0).items()}
    if options.dry_run:
        for name, _ in runs:
            parts = ["python", "-m", "scripts.bakeoff", str(options.config), "--only", name]
            print(shlex.join(parts))
        return
    if options.only is not None:
        if (options.only, 0) not in runs:
            known = "; ".join(name for name, _ in runs)
            raise ValueError(f"--only {options.only!r} is none of the runs: {known}.")
        _run_all({(options.only, options.seed): get_runs(options.seed)[options.only]})
        return
    start = time.monotonic()
    _run_all(runs)
    names = _best([name for name, _ in runs], runs)
    for seed in range(1, options.seeds):
        of_seed = get_runs(seed)
        more = {(name, seed): of_seed[name] for name in names}
        _run_all(more)
        runs |= more
    first = next(iter(runs.values()))
    output = options.output or Path(first.workdir).parent / "table.md"
    output.write_text(_table(runs))
    _draw(runs, output.with_suffix(".png"))
    print(output.read_text())
    print(f"{output} and its .png; {(time.monotonic() - start) / 60:.0f} minutes")


def load_runs(path: Path) -> Callable[[int], dict[str, Config]]:
    """Returns what makes the runs of a seed; ValueError if the file compares nothing."""
    sys.path.insert(0, str(path.parent))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise ValueError(f"{path} is not a config file.")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_runs"):
        raise ValueError(f"{path} has no get_runs(seed); it is one run: stackjax.train it.")
    return module.get_runs


def _run_all(runs: Mapping[tuple[str, int], Config]) -> None:
    for place, ((name, seed), config) in enumerate(runs.items(), 1):
        print(f"[{place}/{len(runs)}] {name}, seed {seed}", flush=True)
        workdir = Path(config.workdir)
        # Named by its source, a run differs from its first stage alone in later stages only.
        config = dataclasses.replace(config, model=stage_models(config)[0], model_is="source")
        if len(config.stages) > 1 and not workdir.exists():
            shared = _first_stage(config)
            train(shared)
            partial = workdir.with_name(workdir.name + ".partial")
            shutil.rmtree(partial, ignore_errors=True)
            shutil.copytree(shared.workdir, partial)
            partial.rename(workdir)
        train(config)


def _first_stage(config: Config) -> Config:
    """Returns the run of the first stage alone, which the runs that begin so share."""
    stage = config.stages[0]
    size = f"{config.model.num_layers}x{config.model.embed_dim}"
    workdir = Path(config.workdir).parent / f"base-{size}-{stage.tokens}-seed_{config.seed}"
    return dataclasses.replace(config, stages=(stage,), workdir=str(workdir))


def _losses(config: Config) -> list[tuple[float, float]]:
    """Returns (FLOPs, held-out loss) of all of a run's evaluations."""
    rows = read_rows(Path(config.workdir))
    return [(row["flops_6nd"], row["held_out_loss"]) for row in rows if "held_out_loss" in row]


def _final(config: Config) -> float:
    return _losses(config)[-1][1]


def _best(names: list[str], runs: Mapping[tuple[str, int], Config]) -> list[str]:
    """Returns the best of each timing, the last word of a name, and the run from scratch."""
    timings: dict[str, list[str]] = {}
    for name in names:
        if name != "scratch":
            timings.setdefault(name.split(", ")[-1], []).append(name)
    ranked = [sorted(of, key=lambda name: _final(runs[name, 0])) for of in timings.values()]
    return [name for of in ranked for name in of[:BEST]] + ["scratch"]


def _table(runs: Mapping[tuple[str, int], Config]) -> str:
    """Returns a Markdown table of the final losses, best first."""
    finals: dict[str, list[float]] = {}
    for (name, _), config in runs.items():
        finals.setdefault(name, []).append(_final(config))
    scratch = finals["scratch"][0]
    lines = ["| run | held-out loss, seed 0 | mean | all seeds |", "|---|---|---|---|"]
    for name, losses in sorted(finals.items(), key=lambda item: item[1][0]):
        every = ", ".join(f"{loss:.4f}" for loss in losses)
        mean = f"{statistics.mean(losses):.4f}" if len(losses) > 1 else ""
        gap = f"{losses[0]:.4f} ({losses[0] - scratch:+.4f})"
        lines.append(f"| {name} | {gap} | {mean} | {every} |")
    return "\n".join(lines) + "\n"


def _draw(runs: Mapping[tuple[str, int], Config], output: Path) -> None:
    """Draws seed 0 of every run, one plot for each timing; scratch stands in all."""
    names = [name for name, seed in runs if seed == 0 and name != "scratch"]
    timings = list(dict.fromkeys(name.split(", ")[-1] for name in names))
    figure, plots = plt.subplots(
        1, len(timings), figsize=(6 * len(timings), 4.6), sharey=True, squeeze=False, dpi=150
    )
    for plot, timing in zip(plots[0], timings, strict=True):
        shown = [name for name in names if name.split(", ")[-1] == timing]
        colors = plt.colormaps["tab10"].colors
        for color, name in zip(colors, shown, strict=False):
            label = name.removesuffix(f", {timing}")
            style = "--" if "width" in name else "-"
            points = _losses(runs[name, 0])
            plot.plot(*zip(*points, strict=True), style, color=color, label=label, lw=1.4)
        plot.plot(*zip(*_losses(runs["scratch", 0]), strict=True), "k:", label="scratch", lw=2)
        plot.set_title(timing)
        plot.set_xlabel("FLOPs, all stages (6 x parameters x tokens)")
        plot.grid(alpha=0.25)
        plot.spines[["top", "right"]].set_visible(False)
    last = max(final for loss in map(_losses, runs.values()) for _, final in loss[-1:])
    best = min(_final(config) for config in runs.values())
    plots[0][0].set_ylim(best - 0.02, last + 0.6)
    plots[0][0].set_ylabel("held-out loss, nats per token")
    plots[0][-1].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(output)
    plt.close(figure)


if __name__ == "__main__":
    main()
