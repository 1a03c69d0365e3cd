"""Comparisons of growth operators: shared first stages, table and figure."""

import dataclasses
import re
import shutil
from pathlib import Path

import pytest
from runs import rows

from scripts import run_pool
from scripts.bakeoff import BakeoffConfig, bake, load_runs
from stackjax.runtime.errors import UserError

RUNS = """
import dataclasses
from pathlib import Path
from stackjax.config_file import read_config
from stackjax.growth import DepthZero, Stack

def get_runs(seed):
    config = read_config(Path("{config}"))
    base, last = config.stages
    stages = {{
        "stack, d": (base, dataclasses.replace(last, growth=Stack(2))),
        "zero, d": (base, dataclasses.replace(last, growth=DepthZero(2))),
        "scratch": (dataclasses.replace(last, growth=None),),
    }}
    return {{
        name: dataclasses.replace(
            config, stages=cells, seed=seed, workdir=f"{runs}/{{name[:4]}}-{{seed}}"
        )
        for name, cells in stages.items()
    }}
"""


@pytest.fixture
def options(world, tmp_path, monkeypatch):
    # Runs are subprocesses with a shared compilation cache.
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(world.path / "compilation_cache"))
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    path = tmp_path / "compared.py"
    path.write_text(RUNS.format(config=world.path / "config.py", runs=tmp_path))
    return BakeoffConfig(config=path, seeds=1, jobs=2)


@pytest.mark.slow
def test_runs_share_the_first_stage_and_give_a_table(options, tmp_path, monkeypatch, capsys):
    bake(options)
    [base] = (path for path in tmp_path.glob("base-*") if path.is_dir())
    assert len(rows(base)) == 10
    finals = {}
    for label, name in (("stack, d", "stac-0"), ("zero, d", "zero-0"), ("scratch", "scra-0")):
        found = rows(tmp_path / name)
        if label != "scratch":
            # Rows before growth are copied from the shared run.
            assert [row for row in found if row["stage"] == 0] == rows(base)
            assert sum(row["kind"] == "growth" for row in found) == 1
        finals[label] = [row["held_out_loss"] for row in found if "held_out_loss" in row][-1]
    table = (tmp_path / "table.md").read_text()
    assert "One seed; no intervals." in table
    assert "FLOPs (6ND) at the end are 1.44e+08 (stack, d)" in table
    for each in ("2 layers x 16 channels", "data: ", "rates: 0.01", str(tmp_path / "zero-0")):
        assert each in table
    for label, loss in finals.items():
        assert re.search(rf"\| {label} \| {loss:.4f} ", table), table
    order = re.findall(r"\| ([a-z, ]+) \| \d", table)
    assert order == sorted(finals, key=finals.get)
    assert (tmp_path / "table.png").stat().st_size > 10_000

    # Finished runs are not repeated; a lost run restarts from the shared stage.
    written = (tmp_path / "stac-0" / "metrics.jsonl").stat().st_mtime_ns
    shutil.rmtree(tmp_path / "zero-0")
    bake(options)
    assert (tmp_path / "stac-0" / "metrics.jsonl").stat().st_mtime_ns == written
    assert (tmp_path / "table.md").read_text() == table


def spoiled(options, change):
    """Returns the comparison with an invalid run."""
    path = options.config.with_name("spoiled.py")
    lines = [options.config.read_text(), "whole = get_runs", "def get_runs(seed):"]
    lines += ["    runs = whole(seed)", "    run = runs['zero, d']", *change]
    path.write_text("\n".join([*lines, "    return runs", ""]))
    return dataclasses.replace(options, config=path)


SPOILED = {
    "schedule": (
        [
            "    from stackjax.config import Schedule",
            "    late = Schedule(warmup_tokens=10**9)",
            "    last = dataclasses.replace(run.stages[1], schedule=late)",
            "    runs['zero, d'] = dataclasses.replace(run, stages=(run.stages[0], last))",
        ],
        "zero, d, seed 0: the schedule of stages.1 warms up over 1000000000",
    ),
    "batch": (
        [
            "    last = dataclasses.replace(run.stages[1], accumulate=3)",
            "    runs['zero, d'] = dataclasses.replace(run, stages=(run.stages[0], last))",
        ],
        "zero, d, seed 0: stages.1.batch_size is 8",
    ),
    "data": (
        [
            "    data = dataclasses.replace(run.data, path='nowhere')",
            "    runs['zero, d'] = dataclasses.replace(run, data=data)",
        ],
        "zero, d, seed 0: ",
    ),
    "start": (
        ["    runs['zero, d'] = dataclasses.replace(run, init_from='elsewhere')"],
        "zero, d, seed 0: init_from is elsewhere",
    ),
    "directory": (
        [
            "    other = runs['stack, d'].workdir",
            "    runs['zero, d'] = dataclasses.replace(run, workdir=other)",
        ],
        "directory of stack, d, seed 0",
    ),
}


@pytest.mark.sample(5)
@pytest.mark.parametrize("name", SPOILED)
def test_every_run_is_checked_before_the_first_starts(options, tmp_path, name):
    change, message = SPOILED[name]
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError, match=message) as raised:
        bake(spoiled(options, change))
    assert len(str(raised.value).splitlines()) == 1
    # Python itself may write bytecode.
    left = [path for path in sorted(tmp_path.iterdir()) if path.name != "__pycache__"]
    assert left == sorted([*before, tmp_path / "spoiled.py"])


@pytest.mark.slow
def test_failed_run_is_named_and_other_runs_are_kept(options, tmp_path, monkeypatch, capsys):
    # The run's directory is a file, so the run fails.
    monkeypatch.setattr(run_pool, "_check_apart", lambda runs: None)
    (tmp_path / "scra-0").write_text("")
    with pytest.raises(UserError, match=r"1 of 3 runs failed, .*: scratch, seed 0\."):
        bake(options)
    out = capsys.readouterr().out
    assert "scratch, seed 0: failed: " in out
    assert "stack, d, seed 0: held-out loss" in out


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"only": "stak, d"}, r"--only is 'stak, d'; .* stack, d; zero, d; scratch"),
        ({"config": Path("no.py")}, r"--config no.py: there is no such file"),
    ],
)
def test_unknown_run_or_missing_config_is_refused(options, fields, message):
    with pytest.raises(ValueError, match=message):
        bake(BakeoffConfig(**{"config": options.config, **fields}))


def test_config_without_get_runs_is_refused(world):
    with pytest.raises(ValueError, match=r"has no get_runs\(seed\)"):
        bake(BakeoffConfig(config=world.path / "config.py"))


def test_dry_run_prints_a_command_per_run(options, capsys):
    bake(BakeoffConfig(config=options.config, dry_run=True))
    lines = capsys.readouterr().out.splitlines()
    assert [line.rpartition("--only ")[2] for line in lines] == [
        "'stack, d'",
        "'zero, d'",
        "scratch",
    ]


BROKEN_RUNS = {
    "def get_runs(seed):\n    return {}['a']": r"broken.py, line 2: KeyError: 'a'",
    "def get_runs(seed):\n    raise SystemExit": r"broken.py, line 2: SystemExit",
    "def get_runs():\n    return {}": r"broken.py: TypeError: .* 0 positional arguments",
    "import nowhere": r"broken.py, line 1: ModuleNotFoundError",
    "def get_runs(seed):\n    return [1]": r"get_runs\(0\) must return a dictionary of configs",
    "def get_runs(seed):\n    return {}": r"get_runs\(0\) must return a dictionary of configs",
    "def get_runs(seed):\n    return {'a': 1}": r"get_runs\(0\) has 'a': 1; ",
}


@pytest.mark.parametrize("text", BROKEN_RUNS)
def test_broken_get_runs_is_refused_with_file_and_line(tmp_path, text):
    file = tmp_path / "broken.py"
    file.write_text(text)
    with pytest.raises(UserError, match=BROKEN_RUNS[text]):
        load_runs(file)(0)


def with_stages(config, **changes):
    """The config with other fields in its first and its last stage."""
    first, last = (
        dataclasses.replace(stage, **changes.get(name, {}))
        for name, stage in zip(("first", "last"), config.stages, strict=True)
    )
    return dataclasses.replace(config, stages=(first, last))


def test_only_equal_first_stages_have_the_same_directory(world):
    config = world.config()
    base = run_pool._base(config)
    assert run_pool._base(with_stages(config, last={"peak_learning_rate": 0.5})) == base
    for change in ({"batch_size": 4}, {"rope_theta": 5e4}, {"peak_learning_rate": 0.5}):
        assert run_pool._base(with_stages(config, first=change)).workdir != base.workdir


def test_first_stages_are_shared_if_later_sequences_are_no_longer(world):
    config = world.config()
    for changes, is_shared in (
        ({}, True),
        ({"last": {"seq_len": 8}}, True),
        ({"last": {"seq_len": 32}}, False),
        ({"last": {"growth": None}}, False),
    ):
        assert run_pool._shares_first_stages(with_stages(config, **changes)) == is_shared
