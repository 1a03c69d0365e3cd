"""The table of configs on described machines."""

import re
from pathlib import Path

import pytest

from scripts import fit_table
from scripts.fit_table import MACHINES, TableConfig, write
from stackjax.config_file import read_config

FITS = {
    "accumulate": 4,
    "remat": "lean",
    "attention": "cudnn",
    "peak_bytes": 20 * 2**30,
    "usable_bytes": 60 * 2**30,
    "synchronous_bytes": 2e9,
    "wire_bytes": 30e9,
    "seconds": 1.25,
    "mfu": 0.543,
}
TOO_LARGE = {"refusal": "too large"}


@pytest.fixture
def options(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("Before\n<!-- begin tables -->\n<!-- end tables -->\nAfter\n")
    return TableConfig(
        configs=(Path("configs/gstack_410m.py"),),
        devices=("h100:8", "v5e:4x4"),
        results=tmp_path / "results",
        page=page,
    )


def test_page_has_a_line_for_each_step_and_only_missing_results_are_made(
    options, monkeypatch, tmp_path
):
    made = []

    def fit_step(config, phase, machine):
        made.append((phase.stage, machine))
        return TOO_LARGE if phase.stage else FITS

    monkeypatch.setattr(fit_table, "_machine", lambda name: name)
    monkeypatch.setattr(fit_table, "_fit_step", fit_step)
    write(options)
    write(options)
    assert made == [(stage, name) for name in options.devices for stage in (0, 1)]
    text = options.page.read_text()
    assert text.startswith("Before\n") and text.endswith("\nAfter\n")
    for devices in options.devices:
        assert (
            f"| {devices} | stage 0 | 0.14B | 4 | lean | 20.0 | 60.0 | 30.0 | 2.0 | 1.25 | 54 |"
            in text
        )
        assert f"| {devices} | stage 1 | 0.37B | too large | - |" in text
    assert (tmp_path / "page.png").stat().st_size > 1000


def test_command_needs_no_options():
    assert TableConfig().devices == MACHINES


def test_every_table_of_the_page_has_the_same_machines():
    page = Path("docs/fit_table.md").read_text()
    tables = page.split("\n## ")[1:]
    assert len(tables) >= 5
    machines = [
        set(re.findall(r"^\| (\w[\w-]*:\S+) \|", table, re.MULTILINE)) for table in tables
    ]
    assert len(machines[0]) >= 2 and all(each == machines[0] for each in machines)
    for table in tables:
        assert read_config(Path(table.splitlines()[0])).platform == "accelerator"
