"""Trains a grid over learning rate, depth and width, standard and under CompleteP.

    python -m scripts.transfer configs/transfer_tiny.py --jobs 2

The config's model is the base. The picture has the held-out loss over the learning rate, with a
plot for each parametrization and axis; the table has the best rate of each size. Finished runs
are kept as data in the output directory and are not trained again, so the same command resumes.
`--dry-run` prints a command for each run.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, NamedTuple

import matplotlib.pyplot as plt
import tyro

from scripts.cells import check_phases, pick, print_commands
from scripts.page import check_page, write_table
from scripts.run_pool import Jobs, run_all, train_all
from scripts.run_store import RunStore, provenance
from stackjax.analysis.plots import sign
from stackjax.config import Config
from stackjax.config_file import read_config
from stackjax.files.output import check_output_directory
from stackjax.model import ModelConfig
from stackjax.model.config import CompleteP
from stackjax.runtime.command_line import parse
from stackjax.runtime.constraints import Checked
from stackjax.runtime.errors import UserError, one_line_errors
from stackjax.runtime.numbers import Count, Rate, Seed, Size
from stackjax.runtime.ranges import Length
from stackjax.runtime.text_table import markdown_table

AXES = {
    "layers": ("num_layers",),
    "channels": ("embed_dim", "mlp_dim", "num_heads", "num_kv_heads"),
}
"""The model fields multiplied along each axis."""
PARAMETRIZATIONS = ("standard", "CompleteP")

Multiples = Annotated[tuple[Size, ...], Length(at_most=100)]


class Cell(NamedTuple):
    """A run of the grid."""

    parametrization: str
    axis: str
    multiple: int
    """Size relative to the base."""
    rate: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransferConfig(Checked):
    """Trains a grid over learning rate, depth and width, standard and under CompleteP."""

    config: Annotated[Path, tyro.conf.Positional]
    """A run with one stage, such as configs/transfer_tiny.py; its model is the base."""
    rates: Annotated[tuple[Rate, ...], Length(at_most=100)] = (
        *(1e-3, 2e-3, 4e-3, 8e-3),
        *(1.6e-2, 3.2e-2, 6.4e-2),
    )
    """Peak learning rates."""
    layers: Multiples = (1, 2, 4, 8)
    """Depths relative to the base."""
    channels: Multiples = (1, 2, 4, 8)
    """Widths relative to the base: channels, units and heads."""
    seed: Seed = 0
    """Seed of every run."""
    jobs: Jobs = 1
    """Concurrent runs; they share the cores."""
    cell: Count | None = None
    """Train only this run, by index."""
    output: Path = Path("docs/evidence")
    """Directory for finished runs, table and picture."""
    page: Path | None = None
    """Page with markers for the table; by default transfer.md in the output directory."""
    dry_run: bool = False
    """Print a command for each run instead of training."""


def main() -> None:
    """Runs the command line."""
    with one_line_errors():
        transfer(parse(TransferConfig, prog="python -m scripts.transfer"))


def transfer(options: TransferConfig) -> None:
    """Trains every run, and writes table and picture.

    Raises:
      UserError: The grid and the config do not fit together.
    """
    cells = grid(options)
    # Base sizes are in both grids and train once.
    runs = {(config.workdir, options.seed): config for config in cells.values()}
    check_phases(runs)
    if options.dry_run:
        print_commands("scripts.transfer", len(runs))
        return
    if options.cell is not None:
        run_all(pick(runs, options.cell), options.jobs)
        return
    check_output_directory("output", options.output)
    check_page("transfer", options.page)
    options.output.mkdir(parents=True, exist_ok=True)
    store = RunStore(options.output / "runs.jsonl")
    missing = {label: run for label, run in runs.items() if _label(run) not in store.runs(run)}
    for label, diverged in train_all(missing, options.jobs, may_diverge=True):
        store.add(missing[label], diverged=diverged)
    found = {cell: store.runs(config)[_label(config)] for cell, config in cells.items()}
    losses = {cell: run.loss for cell, run in found.items()}
    write_table(table(losses), "transfer", options.output, options.page)
    draw(losses, provenance(found.values()), options.output / "transfer.png")


def _label(config: Config) -> tuple[float, int]:
    return config.optimizer.peak_learning_rate, config.seed


def grid(options: TransferConfig) -> dict[Cell, Config]:
    """Returns the config of every run."""
    base = read_config(options.config)
    if len(base.stages) != 1 or base.model.completep is not None:
        raise UserError(
            f"{options.config} has {len(base.stages)} stages and model.completep "
            f"{base.model.completep}; a grid of learning rates needs a standard model in one "
            f"stage."
        )
    multiples = {"layers": options.layers, "channels": options.channels}
    cells = [
        Cell(parametrization, axis, multiple, rate)
        for parametrization in PARAMETRIZATIONS
        for axis in AXES
        for multiple in sorted(set(multiples[axis]))
        for rate in sorted(set(options.rates))
    ]
    return {cell: _run(base, cell, options.seed) for cell in cells}


def _run(base: Config, cell: Cell, seed: int) -> Config:
    """Returns the run of a cell; at the base sizes, both parametrizations are the same."""
    model = _model(base.model, cell)
    kind = cell.parametrization if cell.multiple > 1 else "base"
    name = f"{kind}-{model.num_layers}x{model.embed_dim}-{cell.rate:g}-seed_{seed}"
    return dataclasses.replace(
        base,
        model=model,
        optimizer=dataclasses.replace(base.optimizer, peak_learning_rate=cell.rate),
        seed=seed,
        workdir=str(Path(base.workdir).parent / name),
    )


def _model(base: ModelConfig, cell: Cell) -> ModelConfig:
    sizes = {field: cell.multiple * getattr(base, field) for field in AXES[cell.axis]}
    scaled = cell.parametrization == "CompleteP" and cell.multiple > 1
    completep = CompleteP.of(base) if scaled else None
    return dataclasses.replace(base, **sizes, completep=completep)


def best_rates(losses: Mapping[Cell, float]) -> dict[tuple[str, str, int], tuple[float, float]]:
    """Returns the best rate and its loss, by parametrization, axis and multiple."""
    found: dict[tuple[str, str, int], tuple[float, float]] = {}
    for cell, loss in losses.items():
        label = cell[:3]
        if label not in found or loss < found[label][1]:
            found[label] = (cell.rate, loss)
    return found


def table(losses: Mapping[Cell, float]) -> str:
    """Returns the best rate of each size in Markdown, and the loss that the smallest size's
    best rate adds.

    Best rates at the end of the grid are marked, because better rates may lie outside.
    """
    best, rates = best_rates(losses), sorted({cell.rate for cell in losses})
    smallest: dict[tuple[str, str], int] = {}
    for parametrization, axis, multiple in sorted(best, key=lambda label: label[2]):
        smallest.setdefault((parametrization, axis), multiple)
    rows = []
    for (parametrization, axis, multiple), (rate, loss) in best.items():
        at_base, _ = best[parametrization, axis, smallest[parametrization, axis]]
        more = losses[Cell(parametrization, axis, multiple, at_base)] - loss
        at_end = " (end of the grid)" if rate in (rates[0], rates[-1]) else ""
        cells = (f"{rate:g}{at_end}", f"{loss:.4f}", f"{more:+.4f}")
        rows.append([parametrization, axis, f"{multiple} x base", *cells])
    head = [
        "",
        "axis",
        "size",
        "best rate",
        "held-out loss",
        "added by the smallest size's best rate",
    ]
    return f"{markdown_table(head, rows)}\n\nOne seed; no intervals.\n"


def draw(losses: Mapping[Cell, float], trace: str, output: Path) -> None:
    """Draws the loss over the learning rate, a plot for each parametrization and axis."""
    figure, plots = plt.subplots(2, 2, figsize=(10, 8), sharex=True, sharey=True, dpi=150)
    figure.set_layout_engine("constrained")
    for row, axis in zip(plots, AXES, strict=True):
        for plot, kind in zip(row, PARAMETRIZATIONS, strict=True):
            multiples = sorted({each.multiple for each in losses if each.axis == axis})
            for place, multiple in enumerate(multiples):
                points = sorted(
                    (cell.rate, loss)
                    for cell, loss in losses.items()
                    if cell[:3] == (kind, axis, multiple)
                )
                color = plt.colormaps["viridis"](place / max(1, len(multiples)))
                plot.plot(*zip(*points, strict=True), "o-", color=color, label=f"{multiple} x")
                plot.plot(*min(points, key=lambda point: point[1]), "*", color=color, ms=14)
            plot.set_xscale("log", base=2)
            plot.set_title(f"{kind}, {axis}")
            plot.grid(alpha=0.25)
            plot.legend(frameon=False, fontsize=8)
        row[0].set_ylabel("held-out loss, nats per token")
    for plot in plots[-1]:
        plot.set_xlabel("peak learning rate")
    sign(figure, [trace]).savefig(output)
    plt.close(figure)


if __name__ == "__main__":
    main()
