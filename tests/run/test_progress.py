"""The terminal shows a line for each row, or a bar that never wraps."""

import io
import itertools

import jax
import pytest
import rich.console

from stackjax.run import progress
from stackjax.runtime.numbers import short

ROW = {
    "kind": "train",
    "phase": 1,
    "stage": 1,
    "step": 512,
    "tokens": 2_097_152,
    "loss": 1.234,
    "learning_rate": 3e-4,
    "grad_norm": 0.51,
    "tokens_per_second": 41_200.0,
    "mfu": 0.4312,
    "flops": 1e15,
}


def test_row_is_one_line_without_terminal(capsys):
    shown = progress.open_progress()
    shown.row(ROW, 8_000_000, 143.2)
    shown.note("stage 1: Stack(factor=4)")
    shown.close()
    assert capsys.readouterr().out == (
        "stage 1  2.10M/8.00M tokens  loss  1.234  lr 3.0e-04  grad  0.51  "
        "41.2k tok/s  mfu 43.1%  eta 2:23\n"
        "stage 1: Stack(factor=4)\n"
    )


@pytest.mark.parametrize("unknown", [{}, {"mfu": None}])
def test_unknown_mfu_is_omitted(capsys, unknown):
    row = {name: value for name, value in ROW.items() if name != "mfu"} | unknown
    progress.Lines().row(row, 8_000_000, 5.0)
    assert "mfu" not in capsys.readouterr().out


def test_columns_stay_aligned(capsys):
    tokens, losses, rates = (512, 99_999, 7_999_999), (11.2, 1.234), (999.6, 41_200)
    for count, loss, rate in itertools.product(tokens, losses, rates):
        numbers = {"tokens": count, "loss": loss, "tokens_per_second": rate}
        progress.Lines().row(ROW | numbers, 8_000_000, 5.0)
    lines = capsys.readouterr().out.splitlines()
    assert len({line.index("eta") for line in lines}) == 1


def test_other_processes_show_nothing(capsys, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    shown = progress.open_progress()
    shown.row(ROW, 8_000_000, 5.0)
    shown.note("nothing")
    shown.close()
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("width", [40, 80, 200])
def test_bar_fits_terminal(width):
    file = io.StringIO()
    console = rich.console.Console(
        file=file, width=width, force_terminal=True, color_system=None
    )
    bar = progress.Bar(console)
    bar.row(ROW, 8_000_000, 143.2)
    bar.note("[embed] grew")
    bar.close()
    lines = file.getvalue().replace("\r", "\n").splitlines()
    last = [line for line in lines if "loss" in line][-1]
    assert rich.console.Text.from_ansi(last).cell_len <= width
    assert any("[embed] grew" in line for line in lines)
    if width >= 80:
        assert "26%" in last
        assert "stage 1" in last
        assert "41.2k tok/s  mfu 43.1%  eta 2:23" in last


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (0.6621, "0.662"),
        (7.4, "7.4"),
        (999.4, "999"),
        (999.6, "1.00k"),
        (41_200, "41.2k"),
        (105_000, "105k"),
        (999_499, "999k"),
        (999_999, "1.00M"),
        (97_500_000_000, "97.5B"),
        (1.2e13, "12.0T"),
    ],
)
def test_counts_have_three_digits(number, text):
    assert short(number) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00"), (83.4, "1:23"), (3599.9, "1:00:00"), (9e5, "250:00:00")],
)
def test_durations_have_hours_if_needed(seconds, text):
    assert progress._duration(seconds) == text
