"""Growth from the mean parameters of the last checkpoints."""

import dataclasses
import re
import shutil
import signal

import jax
import numpy as np
import pytest
from conftest import tiny_run
from etils import epath
from runs import assert_same_run, last_state, rows

from stackjax.checkpoint.directory import saved_steps
from stackjax.config import CheckpointConfig, EarlyStop, ProbeConfig
from stackjax.growth import DepthRandom, Learn, Stack, WidthZero
from stackjax.run import seam as seam_module
from stackjax.run import validation
from stackjax.run.averaging import check_averages
from stackjax.run.growth_probe import check_probes
from stackjax.run.train import train
from stackjax.sharding.config import MeshConfig
from stackjax.training.expand import expand

STEP = 128


def run(world, workdir, number=3, growth=None, until=None, first=8, **fields):
    """Eight steps, saved after steps 3, 6 and 8; the mean of the last checkpoints grows."""
    config = world.config(workdir=workdir)
    small, large = config.stages
    small = dataclasses.replace(small, tokens=first * STEP, until=until or EarlyStop())
    large = dataclasses.replace(
        large,
        tokens=2 * STEP,
        growth=growth or WidthZero(embed=2, mlp=2, heads=2),
        average_checkpoints=number,
        **fields,
    )
    return dataclasses.replace(config, model_is="source", stages=(small, large))


def seam_row(workdir):
    [row] = [row for row in rows(workdir) if row["kind"] == "growth"]
    return row


def mean_of(workdir, steps):
    """The mean parameters in checkpoints of the first stage, in float64."""
    params = [last_state(workdir, 0, step)["params"] for step in steps]
    return jax.tree.map(
        lambda *leaves: np.mean(np.stack(leaves), axis=0, dtype=np.float64), *params
    )


@pytest.fixture(scope="module")
def averaged(world, tmp_path_factory):
    """A run on eight devices whose function is the same before and after growth."""
    workdir = tmp_path_factory.mktemp("averaged") / "run"
    train(run(world, workdir, optimizer_state="keep"))
    return workdir


def assert_stacked(workdir, steps):
    """Asserts that stage 1 begins with two copies of the mean parameters, one on the other."""
    mean = mean_of(workdir, steps)
    grown = last_state(workdir, 1, step=0)["params"]
    double = jax.tree.map(lambda leaf: np.concatenate([leaf, leaf]), mean["layers"])
    expected = mean | {"layers": double}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-6, 1e-8), grown, expected)


GROWN = {
    "all": ({}, (3, 6, 8)),
    "two": ({"number": 2}, (6, 8)),
    "ended early": ({"until": EarlyStop(tokens=7 * STEP)}, (3, 6, 7)),
    "ended early at a multiple": ({"until": EarlyStop(tokens=6 * STEP), "number": 2}, (3, 6)),
    "another mesh": ({"mesh": MeshConfig(tensor=2)}, (3, 6, 8)),
}


@pytest.mark.sample(2)
@pytest.mark.parametrize("name", GROWN)
def test_mean_of_the_last_checkpoints_grows(world, tmp_path, name):
    fields, steps = GROWN[name]
    train(run(world, tmp_path, growth=Stack(2), **fields))
    assert_stacked(tmp_path, steps)


def test_function_preserving_growth_keeps_the_loss_of_the_mean(averaged):
    row = seam_row(averaged)
    before, mean, after = (
        row[f"held_out_loss{suffix}"] for suffix in ("_before", "_averaged", "")
    )
    assert after == pytest.approx(mean, abs=1e-5)
    assert abs(before - mean) > 1e-3


def test_optimizer_state_is_of_the_last_checkpoint(averaged):
    source, grown = (last_state(averaged, stage, step) for stage, step in ((0, 8), (1, 0)))
    old, new = (state["opt_state"][1]["mu"]["layers"]["down"] for state in (source, grown))
    np.testing.assert_array_equal(new[tuple(map(slice, old.shape))], old)


@pytest.mark.slow
def test_eight_devices_average_as_one(world, averaged, tmp_path):
    overrides = ["--model-is", "source", "--stages.1.tokens", str(2 * STEP)]
    overrides += ["--stages.1.growth", "width_zero(embed=2, mlp=2, heads=2)"]
    overrides += ["--stages.1.average-checkpoints", "3", "--stages.1.optimizer-state", "keep"]
    assert world.run(world.args(tmp_path, *overrides))[0] == 0
    found, wanted = seam_row(tmp_path), seam_row(averaged)
    assert found.keys() == wanted.keys()
    assert found["held_out_loss_averaged"] == pytest.approx(
        wanted["held_out_loss_averaged"], rel=1e-4
    )


@pytest.mark.slow
def test_mean_is_of_trained_parameters_before_masks_apply(world, tmp_path):
    masked = dataclasses.replace(
        run(world, tmp_path).stages[1],
        tokens=6 * STEP,
        growth=DepthRandom(2, mask_tokens=5 * STEP),
        average_checkpoints=1,
    )
    config = run(world, tmp_path, growth=Stack(2), number=2)
    small, last = config.stages
    checkpoints = dataclasses.replace(config.checkpoints, every_tokens=3 * STEP)
    stages = (dataclasses.replace(small, tokens=2 * STEP), masked, last)
    train(dataclasses.replace(config, stages=stages, checkpoints=checkpoints))
    # Multiples of three steps fall on steps 1, 4 of the second stage; its end is step 6.
    params = [last_state(tmp_path, 1, step)["params"]["layers"]["down"] for step in (4, 6)]
    grown = last_state(tmp_path, 2, step=0)["params"]["layers"]["down"]
    expected = np.mean(params, axis=0, dtype=np.float64)
    np.testing.assert_allclose(grown, np.concatenate([expected, expected]), 1e-6, 1e-8)


def stop_at(config, monkeypatch, nth):
    """Trains until the nth evaluation, whose step is saved at a signal to stop."""
    real, calls = validation.eval_batches, []

    def stopping(*args, **kwargs):
        calls.append(0)
        if len(calls) == nth:
            signal.raise_signal(signal.SIGTERM)
        return real(*args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="143"):
        patch.setattr(validation, "eval_batches", stopping)
        train(config)


def test_stopped_run_averages_the_same_checkpoints(world, averaged, tmp_path, monkeypatch):
    config = run(world, tmp_path, optimizer_state="keep")
    checkpoints = dataclasses.replace(config.checkpoints, keep_last=3)
    config = dataclasses.replace(config, checkpoints=checkpoints)
    # The stop saves step 5, which does not replace step 3.
    stop_at(config, monkeypatch, 1)
    saved = epath.Path(tmp_path / "stage_0" / "train")
    assert saved_steps(saved) == [3, 5]
    train(config)
    assert saved_steps(saved) == [3, 5, 6, 8]
    assert rows(tmp_path) == rows(averaged)
    states = last_state(tmp_path, 1, step=2), last_state(averaged, 1, step=2)
    jax.tree.map(np.testing.assert_array_equal, *states)


@pytest.mark.parametrize("point", ["averaged", "_grow", "clear"])
def test_run_killed_at_the_seam_averages_again(world, averaged, tmp_path, monkeypatch, point):
    workdir = tmp_path / "run"
    shutil.copytree(averaged / "stage_0", workdir / "stage_0")
    for name in ("config.json", "metrics.jsonl"):
        shutil.copy(averaged / name, workdir / name)
    config = run(world, workdir, optimizer_state="keep")
    real = getattr(seam_module, point)

    def killed(*args):
        real(*args)
        raise InterruptedError(point)

    with monkeypatch.context() as patch, pytest.raises(InterruptedError):
        patch.setattr(seam_module, point, killed)
        train(config)
    train(config)
    assert rows(workdir) == rows(averaged)
    states = last_state(workdir, 1, step=0), last_state(averaged, 1, step=0)
    jax.tree.map(np.testing.assert_array_equal, *states)


KILLS = [
    ("SIGKILL", "stackjax.checkpoint.save:Checkpoints.save", "before", 2, -9),
    ("SIGTERM", "stackjax.run.validation:eval_batches", "before", 1, 143),
    ("SIGKILL", "stackjax.run.averaging:load_state", "after", 2, -9),
    ("SIGTERM", "stackjax.training.compile:enter_phase", "before", 1, 143),
]


@pytest.mark.slow
def test_run_killed_at_every_point_averages_the_same_checkpoints(world, tmp_path):
    overrides = ["--stages.1.average-checkpoints", "3", "--checkpoints.keep-last", "3"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert world.run(world.args(whole, *overrides))[0] == 0
    args = world.args(killed, *overrides)
    for number, point, when, nth, expected in KILLS:
        code, _, stderr = world.run(args, number, point, when, str(nth))
        assert (code, stderr) == (expected, ""), f"{when} call {nth} of {point}"
    assert world.run(args)[0] == 0
    assert_same_run(killed, whole)


def test_missing_or_damaged_checkpoint_is_one_line(world, averaged, tmp_path):
    workdir = tmp_path / "run"
    for name in ("config.json", "metrics.jsonl"):
        workdir.mkdir(exist_ok=True)
        shutil.copy(averaged / name, workdir / name)
    shutil.copytree(averaged / "stage_0", workdir / "stage_0")
    config, source = run(world, workdir, optimizer_state="keep"), workdir / "stage_0" / "train"
    for file in (source / "6").rglob("d/*"):
        file.write_bytes(file.read_bytes()[:-9] + bytes(9))
    with pytest.raises(ValueError, match=r"train/6 is damaged: .*add --resume-from stage_0/tr"):
        train(config)
    shutil.rmtree(source / "6")
    with pytest.raises(ValueError, match=r"average_checkpoints is 3, but stage_0/train has 2,"):
        train(config)


def growing(number, checkpoints=None, **fields):
    """Ten steps of 64 tokens, saved every two steps, and growth from a mean."""
    config = tiny_run()
    first, second = config.stages
    second = dataclasses.replace(second, average_checkpoints=number, **fields)
    checkpoints = checkpoints or CheckpointConfig(every_tokens=128, keep_last=9)
    return dataclasses.replace(config, stages=(first, second), checkpoints=checkpoints)


REFUSED = {
    "too many": (
        lambda: growing(6),
        "stages.1.average_checkpoints is 6, but stage_0/train has 5, from its end and every "
        "128 tokens; average fewer, lower checkpoints.every_tokens, or make stage 0 longer.",
    ),
    "rarely saved": (
        lambda: growing(2, CheckpointConfig(every_tokens=10**6)),
        "stages.1.average_checkpoints is 2, but stage_0/train has 1, from its end and every "
        "1000000 tokens",
    ),
    "learned": (lambda: growing(6, growth=Learn(2, fit_steps=2)), "but stage_0/train has 5,"),
    "too few kept": (
        lambda: growing(3, CheckpointConfig(every_tokens=128)),
        "stages.1.average_checkpoints is 3, more than checkpoints.keep_last 2; average fewer, "
        "or keep more.",
    ),
    "none": (lambda: growing(0), "stages.1.average_checkpoints is 0; it must be at least 1"),
    "no growth": (
        lambda: growing(2, growth=None),
        "stages.1.average_checkpoints is 2, which has no effect while stages.1.growth is None",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_mean_of_missing_checkpoints_is_refused_at_the_start(name):
    config, message = REFUSED[name]
    with pytest.raises(ValueError, match=re.escape(message)):
        check_averages(config(), expand(config()))


def test_mean_of_all_checkpoints_is_accepted():
    check_averages(growing(5), expand(growing(5)))


def test_probe_of_a_mean_is_refused():
    probes = ProbeConfig(at_tokens=(128,), lag_tokens=64)
    config = dataclasses.replace(growing(2), probes=probes)
    with pytest.raises(ValueError, match=r"stages.1.average_checkpoints is 2, and a probe"):
        check_probes(config)


def test_stage_that_ends_too_early_is_refused_at_the_seam(world, tmp_path):
    config = run(world, tmp_path, growth=Stack(2), until=EarlyStop(tokens=4 * STEP))
    for _ in range(2):  # at the seam, and at the start of the same command
        with pytest.raises(ValueError, match=r"average_checkpoints is 3, but .* has 2,"):
            train(config)
    small, large = config.stages
    fewer = dataclasses.replace(large, average_checkpoints=2)
    train(dataclasses.replace(config, stages=(small, fewer)))
    assert_stacked(tmp_path, (3, 4))
