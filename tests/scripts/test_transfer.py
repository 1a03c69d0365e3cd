"""Grids over learning rate and size: runs and table."""

from pathlib import Path

import pytest

from scripts.run_store import StoredRun
from scripts.transfer import AXES, Cell, TransferConfig, grid, table, transfer
from stackjax.model.config import CompleteP
from stackjax.runtime.errors import UserError

BASE = Path("configs/transfer_tiny.py")


def test_grid_has_each_size_standard_and_under_completep():
    given = {"rates": (1e-3, 2e-3), "layers": (1, 4), "channels": (1, 2, 8)}
    cells = grid(TransferConfig(config=BASE, **given))
    assert len(cells) == 2 * (2 + 3) * 2
    # The base is in both grids and the same in both parametrizations.
    assert len({config.workdir for config in cells.values()}) == 2 * (1 + 2 * (1 + 2))
    base = next(config for cell, config in cells.items() if cell.multiple == 1).model
    for cell, config in cells.items():
        assert config.optimizer.peak_learning_rate == cell.rate
        for field in {name for names in AXES.values() for name in names}:
            multiple = cell.multiple if field in AXES[cell.axis] else 1
            assert getattr(config.model, field) == multiple * getattr(base, field)
        scaled = cell.parametrization == "CompleteP" and cell.multiple > 1
        assert config.model.completep == (CompleteP.of(base) if scaled else None)


def test_table_has_the_best_rate_and_the_cost_of_the_base_rate():
    losses = {
        Cell("standard", "layers", multiple, rate): loss
        for multiple, rate, loss in [
            (1, 1e-3, 3.0),
            (1, 2e-3, 2.5),
            (1, 4e-3, 2.6),
            (4, 1e-3, 2.0),
            (4, 2e-3, 2.25),
            (4, 4e-3, 2.5),
        ]
    }
    lines = table(losses).splitlines()
    assert [cell.strip() for cell in lines[2].split("|")[3:-1]] == [
        "1 x base",
        "0.002",
        "2.5000",
        "+0.0000",
    ]
    assert [cell.strip() for cell in lines[3].split("|")[3:-1]] == [
        "4 x base",
        "0.001 (end of the grid)",
        "2.0000",
        "+0.2500",
    ]


def test_config_with_growth_is_refused():
    with pytest.raises(UserError, match=r"tiny\.py has 2 stages"):
        grid(TransferConfig(config=Path("configs/tiny.py")))


def test_stored_runs_give_table_and_picture_without_training(tmp_path, monkeypatch, capsys):
    options = TransferConfig(
        config=BASE, rates=(1e-3, 2e-3), layers=(1, 2), channels=(1, 4), output=tmp_path
    )

    def read(config):
        rate, depth = config.optimizer.peak_learning_rate, config.model.num_layers
        run = (1.0, 2.0, 3.0, 3 - 1000 * rate / depth)
        return StoredRun(rate, config.seed, (run,), (), 1.0, "abc", "0.10")

    trained = []

    def train(runs, jobs, may_diverge):
        trained.extend(runs)
        yield from ((label, False) for label in runs)

    monkeypatch.setattr("scripts.run_store._read", read)
    monkeypatch.setattr("scripts.transfer.train_all", train)
    for _ in range(2):
        transfer(options)
        # Base, twice the layers and four times the channels; the last two in both ways.
        assert len(trained) == 2 * (1 + 2 * (1 + 1))
    text = (tmp_path / "transfer.md").read_text()
    assert text in capsys.readouterr().out
    assert "| CompleteP | layers | 2 x base | 0.002 (end of the grid) | 2.5000 |" in text
    assert (tmp_path / "transfer.png").stat().st_size > 10_000
