"""Sweeps over growth timings: shared small model, resumption and reports."""

import dataclasses
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from runs import ROOT, rows

from scripts.sweep import SweepConfig, grid, sweep
from stackjax.config_file import read_config
from stackjax.model.flops import flops_6nd
from stackjax.runtime.errors import UserError
from stackjax.training.expand import expand
from stackjax.training.stages import stage_models

# The small model's learning rate must not depend on the growth timing.
CONFIG = """
import dataclasses
from pathlib import Path
from stackjax.config import Schedule
from stackjax.config_file import read_config

def get_config():
    config = read_config(Path("{config}"))
    base, last = config.stages
    base = dataclasses.replace(base, schedule=Schedule(shape="constant", warmup_tokens=256))
    return dataclasses.replace(config, stages=(base, last), workdir="{runs}")
"""
STEP = 128


def options(world, path, **fields):
    config = path / "swept.py"
    config.write_text(CONFIG.format(config=world.path / "config.py", runs=path / "cells"))
    values = {
        "config": config,
        "tokens": (3 * STEP - 1, 5 * STEP),
        "growths": ("stack(2)", "depth_zero(factor=2)"),
        "seeds": (0,),
        "jobs": 2,
    }
    return SweepConfig(**(values | fields))


@pytest.fixture
def environment(world, monkeypatch):
    # Runs are subprocesses with a shared compilation cache.
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(world.path / "compilation_cache"))
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")


def test_cells_have_equal_cost_and_equal_small_model(world, tmp_path):
    runs = grid(options(world, tmp_path, seeds=(0, 1)))
    assert len(runs) == 2 * (2 * 2 + 1)
    ends = [expand(config)[-1] for config in runs.values()]
    budgets = {phase.end.flops_6nd // (STEP * flops_6nd(phase.model)) for phase in ends}
    # Costs differ by at most one large-model step.
    assert max(budgets) - min(budgets) <= 1
    for (name, seed), config in runs.items():
        assert config.seed == seed
        assert stage_models(config)[-1].num_layers == 2
        if name.startswith("stack(2), 640"):
            small = [stage.tokens for stage in config.stages[:-1]]
            assert small == [3 * STEP, 2 * STEP]


@pytest.mark.slow
def test_randomly_killed_sweep_resumes_to_an_equal_table(world, tmp_path, environment, capsys):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for path in (whole, killed):
        path.mkdir()
    sweep(options(world, whole))
    cells = whole / "cells"
    [base] = (path for path in cells.glob("base-*") if path.is_dir())
    for name in ("stack(2)-384_tokens-seed_0", "stack(2)-640_tokens-seed_0"):
        found = rows(cells / name)
        tokens = int(name.split("-")[1].split("_")[0])
        small = [row for row in found if row["tokens"] <= tokens and row["kind"] == "train"]
        trunk = [row for row in rows(base) if row["kind"] == "train"]
        # The cell's first rows are copied from the shared small model.
        assert small == trunk[: len(small)]
        assert len(small) == tokens / STEP
    table = (cells / "comparison" / "isoflop" / "isoflop.md").read_text()

    given = options(world, killed)
    args = [str(given.config), "--tokens", *map(str, given.tokens), "--jobs", "2"]
    args += ["--growths", *given.growths, "--seeds", "0"]
    rng, environ = random.Random(0), os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    environ |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
    for _ in range(2):
        process = subprocess.Popen(
            [sys.executable, "-m", "scripts.sweep", *args],
            cwd=ROOT,
            env=environ,
            start_new_session=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            process.wait(rng.uniform(2, 6))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    sweep(given)
    found = (killed / "cells" / "comparison" / "isoflop" / "isoflop.md").read_text()
    assert found.replace("/killed/", "/whole/") == table
    # Finished runs are not repeated.
    written = (cells / "scratch-seed_0" / "metrics.jsonl").stat().st_mtime_ns
    sweep(options(world, whole))
    assert (cells / "scratch-seed_0" / "metrics.jsonl").stat().st_mtime_ns == written
    assert (cells / "comparison" / "isoflop" / "isoflop.md").read_text() == table


def test_dry_run_prints_a_command_per_cell(world, tmp_path, monkeypatch, capsys):
    args = ["sweep", "swept.py", "--tokens", "384", "--dry-run"]
    monkeypatch.setattr("sys.argv", args)
    sweep(options(world, tmp_path, dry_run=True))
    lines = capsys.readouterr().out.splitlines()
    assert lines[4] == "python -m scripts.sweep swept.py --tokens 384 --cell 4"
    assert len(lines) == 5


REFUSED = [
    ({"cell": 5}, r"--cell is 5; .* 0 to 4"),
    ({"tokens": (10**9,)}, r"stack\(2\), .*the earlier stages cost"),
    ({"growths": ("stak(2)",)}, r"stak"),
]


@pytest.mark.parametrize(("fields", "message"), REFUSED)
def test_invalid_grid_is_refused(world, tmp_path, fields, message):
    with pytest.raises(ValueError, match=message):
        sweep(options(world, tmp_path, **fields))


@pytest.mark.parametrize("dry_run", [True, False])
def test_invalid_cell_is_found_before_training(world, tmp_path, dry_run):
    given = options(world, tmp_path, dry_run=dry_run)
    flops = expand(read_config(given.config))[-1].end.flops_6nd
    given = dataclasses.replace(given, flops=float(flops))
    cells = grid(given)
    early, late = (cells[f"stack(2), {d} tokens", 0].stages[-1].tokens for d in (384, 640))
    # The warm-up fits into the last stage after early growth, but not after late growth.
    assert late < early
    line = f"last = dataclasses.replace(last, schedule=Schedule(warmup_tokens={early}))"
    text = given.config.read_text()
    given.config.write_text(text.replace("    return", f"    {line}\n    return"))
    found = rf"^stack\(2\), 640 tokens, seed 0: the schedule of stages.2 warms up over {early} "
    with pytest.raises(UserError, match=found):
        sweep(given)
    assert not (tmp_path / "cells").exists()


def test_growth_with_a_fraction_has_a_valid_directory(world, tmp_path):
    runs = grid(options(world, tmp_path, growths=("width_zero(mlp=4/3)",)))
    for config in runs.values():
        assert Path(config.workdir).parent == tmp_path / "cells"


def test_small_model_schedule_must_not_depend_on_timing(world, tmp_path):
    given = options(world, tmp_path, config=world.path / "config.py")
    with pytest.raises(ValueError, match=r"schedule of stages.0 is cosine"):
        sweep(given)
