"""Checkpoint lineage: generations, costs and code version."""

import dataclasses
import importlib.metadata
import json
import subprocess

import pytest
from conftest import tiny_run
from etils import epath
from runs import cut

from stackjax.checkpoint import lineage as lineage_module
from stackjax.checkpoint.directory import find_checkpoint
from stackjax.checkpoint.lineage import (
    begin,
    begin_grown,
    code_version,
    from_json,
    spend,
    total,
)
from stackjax.checkpoint.restore import read_contents
from stackjax.growth import Stack
from stackjax.inference.lineage_table import inspect
from stackjax.inspect import main
from stackjax.options import GrowConfig, InspectConfig
from stackjax.run import grow
from stackjax.runtime.errors import UserError
from stackjax.training.expand import expand
from stackjax.training.phase import Counts


def contents_of(workdir):
    return read_contents(find_checkpoint(epath.Path(workdir)))


def test_lineage_counts_the_tokens_and_flops_of_each_generation():
    phases = expand(tiny_run())
    lineage = ()
    for phase in phases:
        lineage = spend(begin(lineage, phase), phase, phase.num_steps)
    assert total(lineage) == phases[-1].end
    assert [each.growth for each in lineage] == [None, "stack(2)"]
    assert [each.model for each in lineage] == [phase.model for phase in phases]
    again = spend(lineage, phases[-1], 1)
    assert again[:-1] == lineage[:-1]
    assert again[-1].spent == phases[-1].per_step


def test_lineage_round_trips_through_json():
    phases = expand(tiny_run())
    lineage = begin_grown(begin((), phases[0]), Stack(2), phases[1].model)
    plain = json.loads(json.dumps([dataclasses.asdict(each) for each in lineage]))
    assert from_json(plain) == lineage


def test_run_checkpoint_lists_every_stage_and_its_counts_add_up(uncut):
    contents = contents_of(uncut)
    assert total(contents.lineage) == contents.counts
    first, second = contents.lineage
    assert (first.stage, first.name, first.growth) == (0, "train", None)
    assert (second.stage, second.name, second.growth) == (1, "train", "stack(2)")
    assert first.spent.tokens == second.spent.tokens == 8 * 128
    assert second.model == contents.model
    assert {first.code, second.code} == {code_version()}


def test_checkpoint_inside_a_stage_counts_the_tokens_so_far(uncut, tmp_path):
    cut(uncut, tmp_path / "cut", 3)
    [only] = contents_of(tmp_path / "cut").lineage
    assert only.spent.tokens == 3 * 128


def test_grow_command_adds_a_generation_with_zero_counts(uncut, tmp_path):
    target = str(tmp_path / "grown")
    grow.grow(GrowConfig(source=str(uncut), target=target, growth=Stack(3)))
    *before, last = contents_of(target).lineage
    assert tuple(before) == contents_of(uncut).lineage
    assert (last.stage, last.growth, last.spent) == (2, "stack(3)", Counts())
    assert last.model.num_layers == 6
    printed = inspect(InspectConfig(run=target))
    lines = [line.split() for line in printed.splitlines()]
    assert lines[0] == [f"{target}/0"]
    assert [line[:3] for line in lines[2:5]] == [
        ["0", "train", "-"],
        ["1", "train", "stack(2)"],
        ["2", "train", "stack(3)"],
    ]
    assert lines[5][:2] == ["total", "2.05k"]


def test_inspect_prints_the_lineage_as_json(uncut):
    found = json.loads(inspect(InspectConfig(run=str(uncut), json=True)))
    assert from_json(found["lineage"]) == contents_of(uncut).lineage
    assert found["counts"]["tokens"] == 2 * 8 * 128


def init_repository(path):
    git = ["git", "-C", str(path), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "first"], check=True)
    found = subprocess.run([*git, "describe", "--always"], capture_output=True, text=True)
    return found.stdout.strip()


@pytest.mark.parametrize("place", ["site-packages", "."])
@pytest.mark.parametrize("installed", [None, "1.2.3"])
def test_code_version_is_the_commit_of_a_checkout_else_the_package_version(
    tmp_path, monkeypatch, place, installed
):
    def version(name):
        if installed is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed

    commit = init_repository(tmp_path)
    package = tmp_path / place / "stackjax" / "checkpoint"
    package.mkdir(parents=True)
    monkeypatch.setattr(lineage_module, "__file__", str(package / "lineage.py"))
    monkeypatch.setattr(importlib.metadata, "version", version)
    code_version.cache_clear()
    try:
        assert code_version() == (commit if place == "." else installed or "unknown")
        monkeypatch.setenv("PATH", str(tmp_path))  # a PATH without git
        code_version.cache_clear()
        assert code_version() == (installed or "unknown")
    finally:
        code_version.cache_clear()


BAD = {
    "not a list": 3,
    "empty": [],
    "not an object": [3],
    "a missing field": [{"stage": 1}],
    "text for a number": [{"stage": "0"}],
}


@pytest.mark.parametrize("name", BAD)
def test_lineage_with_wrong_types_is_a_user_error(name):
    phases = expand(tiny_run())
    [whole] = [dataclasses.asdict(each) for each in begin((), phases[0])]
    bad = BAD[name]
    if name == "text for a number":
        bad = [whole | bad[0]]
    with pytest.raises(UserError, match="lineage"):
        from_json(bad)
    for field, value in (("model", {"num_layers": []}), ("spent", 3), ("growth", 3.5)):
        with pytest.raises(UserError, match=rf"lineage\.0\.{field}"):
            from_json([whole | {field: value}])


def test_inspect_without_a_checkpoint_prints_a_one_line_error(tmp_path, run_main):
    code, _, error = run_main(main, tmp_path)
    assert (code, error.count("\n")) == (2, 1)
    assert error.startswith("error: there is no checkpoint in ")
