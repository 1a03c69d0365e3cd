"""The training run: growth, failures and invalid input."""

import dataclasses
import errno
import os
import sys

import jax
import numpy as np
import pytest
from etils import epath
from orbax.checkpoint._src.path import atomicity
from runs import cut, last_state, rows

from stackjax.config import Rewarm
from stackjax.config_file import record_config
from stackjax.data.manifest import read_manifest
from stackjax.growth import (
    DepthFresh,
    DepthRandom,
    DepthZero,
    InsertBlock,
    Learn,
    Stack,
    Untie,
    WidthRandom,
    WidthSplit,
    WidthZero,
    chain,
)
from stackjax.run import seam as seam_module
from stackjax.run import train as run_module
from stackjax.run.train import train
from stackjax.sharding.config import MeshConfig
from stackjax.train import main
from stackjax.training.run_history import read_history


def with_stage_1(config, **fields):
    stage = dataclasses.replace(config.stages[1], **fields)
    return dataclasses.replace(config, stages=(config.stages[0], stage))


@pytest.fixture
def at_the_seam(world, uncut, tmp_path):
    """A run at the end of the first stage."""
    cut(uncut, tmp_path, 8)
    return world.config(workdir=tmp_path)


class Compiling(Exception):
    """The run is about to compile a train step."""


def train_until_compiling(config, monkeypatch) -> int:
    """Trains until a train step is compiled; returns the state's step."""

    def run_phase(run, phase, state, counts, *_):
        if int(state.step) < phase.num_steps:
            raise Compiling(int(state.step))
        return state, counts

    with monkeypatch.context() as patch:
        patch.setattr(run_module, "run_phase", run_phase)
        with pytest.raises(Compiling) as compiling:
            train(config)
    return compiling.value.args[0]


def adam(state):
    return state["opt_state"][1]


def test_optimizer_state_grows_or_is_reset(at_the_seam, uncut, tmp_path, monkeypatch):
    train_until_compiling(with_stage_1(at_the_seam, optimizer_state="grow"), monkeypatch)
    source, grown = adam(last_state(uncut, 0)), adam(last_state(tmp_path, 1, step=0))
    afresh = adam(last_state(uncut, 1, step=0))
    for name in ("mu", "nu"):
        for path, moment in jax.tree.leaves_with_path(grown[name]):
            wanted = source[name]
            for key in path:
                wanted = wanted[key.key]
            if moment.shape != wanted.shape:
                wanted = np.concatenate([wanted, wanted])
            np.testing.assert_array_equal(moment, wanted)
        assert all(not moment.any() for moment in jax.tree.leaves(afresh[name]))
    assert (grown["count"], afresh["count"]) == (8, 0)


def test_stage_without_growth_keeps_the_model(at_the_seam, uncut, tmp_path, monkeypatch):
    model = dataclasses.replace(at_the_seam.model, num_layers=1)
    config = with_stage_1(dataclasses.replace(at_the_seam, model=model), growth=None)
    # Nominally a different model.
    record_config(epath.Path(tmp_path), config, [read_manifest(config.data.path)])
    train_until_compiling(config, monkeypatch)
    [seam] = [row for row in rows(tmp_path) if row["kind"] == "growth"]
    assert seam["held_out_loss"] == seam["held_out_loss_before"]
    before, after = last_state(uncut, 0), last_state(tmp_path, 1, step=0)
    jax.tree.map(np.testing.assert_array_equal, before["params"], after["params"])
    jax.tree.map(np.testing.assert_array_equal, before["opt_state"], after["opt_state"])


class Boastful(Stack):
    """A stack that claims to keep the function."""

    preserves_function = "always"


def test_growth_that_changes_the_function_is_not_committed(at_the_seam, tmp_path):
    with pytest.raises(ValueError, match="preserves_function is 'always'"):
        train(with_stage_1(at_the_seam, growth=Boastful(factor=2)))
    assert read_history(epath.Path(tmp_path)).phase == 0
    assert not (tmp_path / "stage_1").exists()
    assert {row["stage"] for row in rows(tmp_path)} == {0}


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    "fields", [{}, {"optimizer_state": "grow", "mesh": MeshConfig(tensor=2)}]
)
def test_growth_frees_source(fields, at_the_seam, monkeypatch):
    def enter(run, source, target, state):
        leaves = jax.tree_util.tree_leaves_with_path(state)
        real_enter(run, source, target, state)
        assert [path for path, leaf in leaves if not leaf.is_deleted()] == []
        raise InterruptedError("seen")

    real_enter = run_module.enter
    monkeypatch.setattr(run_module, "enter", enter)
    with pytest.raises(InterruptedError, match="seen"):
        train(with_stage_1(at_the_seam, **fields))


@pytest.mark.slow
def test_losses_do_not_change_with_sharded_sequences(at_the_seam, uncut, tmp_path):
    # Stage 1 has whole sequences for one of two key heads on each device.
    config = with_stage_1(at_the_seam, mesh=MeshConfig(fsdp=4, context=2))
    layers = dataclasses.replace(config.evaluation, layers=True)
    train(dataclasses.replace(config, evaluation=layers))
    found, expected = ([row for row in rows(run) if row["stage"]] for run in (tmp_path, uncut))
    assert "layers" in {row["kind"] for row in found}
    for name in ("loss", "grad_norm", "held_out_loss"):
        values = [[row[name] for row in rows if name in row] for rows in (found, expected)]
        assert len(values[0]) >= 2
        # The same float32 sums in another order, over eight updates.
        assert values[0] == pytest.approx(values[1], rel=1e-4)


def grown_run(world, workdir, growth, **fields):
    """A run whose second stage has eight steps and grows from 2 layers x 16 channels."""
    config = with_stage_1(world.config(), growth=growth, **fields)
    return dataclasses.replace(config, model_is="source", workdir=str(workdir))


WIDE = {"embed": 2, "mlp": 2, "heads": 2}
KEPT = {"optimizer_state": "keep", "rewarm": Rewarm(tokens=256), "scale_by_fan_in": True}


def test_run_of_a_looped_model_keeps_its_loss_when_untied(world, tmp_path):
    config = grown_run(world, tmp_path, Untie(3), optimizer_state="grow")
    model = dataclasses.replace(config.model, num_layers=1, loops=3)
    evaluation = dataclasses.replace(config.evaluation, layers=True)
    train(dataclasses.replace(config, model=model, evaluation=evaluation))
    [seam] = [row for row in rows(tmp_path) if row["kind"] == "growth"]
    assert seam["held_out_loss"] == pytest.approx(seam["held_out_loss_before"], abs=1e-6)
    [layers] = [
        row for row in rows(tmp_path) if row["kind"] == "layers" and "norm_before" in row
    ]
    assert layers["contribution"] == pytest.approx(layers["contribution_before"], rel=1e-5)
    assert last_state(tmp_path, 1)["params"]["layers"]["down"].shape[0] == 3


def test_run_grows_from_no_layers_and_resumes(world, tmp_path, monkeypatch):
    config = grown_run(world, tmp_path / "whole", DepthFresh(2), optimizer_state="keep")
    model = dataclasses.replace(config.model, num_layers=0)
    evaluation = dataclasses.replace(config.evaluation, layers=True)
    whole = dataclasses.replace(config, model=model, evaluation=evaluation)
    train(whole)
    cut(tmp_path / "whole", tmp_path / "cut", 6)
    train(dataclasses.replace(whole, workdir=str(tmp_path / "cut")))
    for path in (tmp_path / "whole", tmp_path / "cut"):
        assert last_state(path, 1, 8)["params"]["layers"]["down"].shape[0] == 2
    assert [row["loss"] for row in rows(tmp_path / "whole") if "loss" in row] == [
        row["loss"] for row in rows(tmp_path / "cut") if "loss" in row
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("growth", "fields"),
    [
        (chain(WidthSplit(**WIDE, split="uneven"), DepthZero(2)), KEPT),
        (WidthZero(**WIDE), {"optimizer_state": "grow"}),
        (chain(DepthRandom(2, 256), WidthRandom(**WIDE, mask_tokens=256)), {}),
        (InsertBlock(1, at="last"), {"train_layers": "new"}),
    ],
    ids=["exact", "zero", "masked", "frozen"],
)
def test_growth_on_eight_devices(growth, fields, world, tmp_path):
    config = grown_run(world, tmp_path, growth, **fields)
    train(config)
    [seam] = [row for row in rows(tmp_path) if row["kind"] == "growth"]
    if growth.preserves_function != "never":
        assert seam["held_out_loss"] == pytest.approx(seam["held_out_loss_before"], abs=1e-5)
    before, after = (
        last_state(tmp_path, 1, step)["params"]["layers"]["down"] for step in (0, 8)
    )
    target = growth.target_config(config.model)
    assert after.shape == (target.num_layers, target.mlp_dim, target.embed_dim)
    # Only layers below the first trained layer are unchanged.
    frozen = 2 if "train_layers" in fields else 0
    moved = [(old != new).any() for old, new in zip(before, after, strict=True)]
    assert moved == [False] * frozen + [True] * (target.num_layers - frozen)


@pytest.mark.slow
def test_learned_growth_resumes_between_fit_and_training(world, tmp_path, monkeypatch, capsys):
    growth = Learn(2, **WIDE, fit_steps=3)
    whole, cut_short = (grown_run(world, tmp_path / name, growth) for name in ("a", "b"))
    train(whole)

    def clear(workdir, phase):
        if phase.index == 2:
            raise InterruptedError("killed")
        real_clear(workdir, phase)

    real_clear = seam_module.clear
    with monkeypatch.context() as patch:
        patch.setattr(seam_module, "clear", clear)
        with pytest.raises(InterruptedError):
            train(cut_short)
    train(cut_short)
    assert rows(tmp_path / "a") == rows(tmp_path / "b")
    states = [last_state(tmp_path / name, 1, step=5) for name in ("a", "b")]
    jax.tree.map(np.testing.assert_array_equal, *states)
    # The source is frozen while the maps train.
    fits = [last_state(tmp_path / "a", 1, step, "fit")["params"] for step in (0, 3)]
    jax.tree.map(np.testing.assert_array_equal, *(fit["source"] for fit in fits))
    into_fit, into_train = [row for row in rows(tmp_path / "a") if row["kind"] == "growth"]
    assert into_train["held_out_loss_before"] < into_fit["held_out_loss"]
    same = pytest.approx(into_train["held_out_loss_before"], abs=1e-5)
    assert into_train["held_out_loss"] == same


@pytest.mark.slow
def test_symmetric_copies_are_reported(world, tmp_path, monkeypatch, capsys):
    config = grown_run(world, tmp_path, WidthSplit(**WIDE))
    monkeypatch.setattr(
        run_module, "run_phase", lambda run, phase, state, counts, *_: (state, counts)
    )
    train(config)
    said = " ".join(capsys.readouterr().out.split())
    assert "width_split" in said and "split=uneven or noise" in said


def test_full_disk_keeps_earlier_checkpoint(world, uncut, tmp_path, monkeypatch, capsys):
    async def finalize(self, *args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    cut(uncut, tmp_path, 6)
    with monkeypatch.context() as patch:
        patch.setattr(atomicity.AtomicRenameTemporaryPath, "finalize", finalize)
        error = error_of(world.args(tmp_path), patch, capsys)
    assert "No space left on device" in error
    config = world.config(workdir=tmp_path)
    assert train_until_compiling(config, monkeypatch) == 6


def error_of(args, monkeypatch, capsys) -> str:
    """Runs the command and returns the error, which must be one line."""
    monkeypatch.setattr(sys, "argv", ["train", *args])
    with pytest.raises(SystemExit) as exit:
        main()
    error = capsys.readouterr().err
    assert exit.value.code == 2
    assert error.startswith("error: ") and error.count("\n") == 1
    return error


WRONG = {
    "--stages.0.batch-size 12": "stages.0.batch_size is 12, which does not divide",
    "--evaluation.batch-size 12": "evaluation.batch_size is 12, which does not divide",
    "--model.embed-dim 20": "model.embed_dim is 20",
    "--mesh.tensor 8": "model.num_heads is 4",
    "--mesh.fsdp 3": "does not fit 8 devices",
    "--platform accelerator": "platform is 'accelerator', but JAX has only the CPU here",
    "--data.path nowhere": "python -m stackjax.prepare INPUT... nowhere",
    "--model.vocab-size 99": "the tokenizer 'bytes'",
    "--logging.wandb-project mine": "pip install wandb",
    "--stages.1.growth.factor 3": "3 does not divide 2",
    "--evaluation.num-sequences 99999": "give --evaluation.num-sequences",
    "--data.seq-len 999999": "choose a shorter sequence",
    "--stages.0.tokens 0": "stages.0.tokens is 0; it must be at least 1",
    "--workdir /proc/nowhere/run": "/proc/nowhere",
}


@pytest.mark.parametrize("override", WRONG)
def test_invalid_input_is_one_line_without_side_effects(
    override, world, tmp_path, monkeypatch, capsys
):
    workdir = tmp_path / "run"
    error = error_of(world.args(workdir, *override.split()), monkeypatch, capsys)
    assert WRONG[override] in error
    assert not workdir.exists()
