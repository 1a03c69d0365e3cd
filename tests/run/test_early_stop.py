"""Early stopping: conditions, rows, and kills at the early end."""

import dataclasses
import importlib
import itertools
import json

import jax
import numpy as np
import pytest
from conftest import tiny_run
from runs import last_state, rarely_saved, rows

from stackjax.analysis.reading import read_record
from stackjax.config import EarlyStop, ProbeConfig, Schedule
from stackjax.growth import DepthRandom, Learn
from stackjax.run.early_stop import budget_reason, loss_reason
from stackjax.run.train import train
from stackjax.training.expand import expand
from stackjax.training.phase import EarlyEnd, Waypoint
from stackjax.training.preflight import check
from stackjax.training.run_history import RunHistory

STEP = 128

SPENT = [
    (EarlyStop(), 10**12, 10**24, None),
    (EarlyStop(tokens=100), 99, 0, None),
    (EarlyStop(tokens=100), 100, 0, "100 tokens"),
    (EarlyStop(tokens=100, flops_6nd=1e9), 50, 10**9, "1e+09 FLOPs"),
    (EarlyStop(flops_6nd=1e9), 10**9, 10**9 - 1, None),
]


@pytest.mark.parametrize(("until", "tokens", "flops", "reason"), SPENT)
def test_stage_ends_at_budget(until, tokens, flops, reason):
    found = budget_reason(until, tokens, flops)
    assert found is None if reason is None else reason in str(found)


def test_stage_ends_at_loss():
    until = EarlyStop(loss=2.5)
    assert loss_reason(until, [(10, 2.6), (20, 2.5001)]) is None
    assert "loss is 2.5000" in (loss_reason(until, [(10, 2.6), (20, 2.5)]) or "")
    # Only the last loss counts.
    assert loss_reason(until, [(10, 2.4), (20, 2.6)]) is None


def test_plateau_is_slope_over_log_tokens():
    tokens = np.arange(1, 21) * 1000
    losses = 3 - 0.4 * np.log(tokens) + 0.001 * np.random.default_rng(0).normal(size=20)
    fall = -np.polyfit(np.log(tokens[9:]), losses[9:], 1)[0]
    seen = list(zip(tokens.tolist(), losses.tolist(), strict=True))
    window = {"slope_tokens": 10_000}
    assert loss_reason(EarlyStop(slope=fall * 0.999, **window), seen) is None
    reason = loss_reason(EarlyStop(slope=fall * 1.001, **window), seen)
    assert reason is not None and f"{fall:.3g} nats" in reason
    # Not before the window is full, and not with two evaluations.
    assert loss_reason(EarlyStop(slope=99.0, **window), seen[:10]) is None
    assert loss_reason(EarlyStop(slope=99.0, **window), seen[:11]) is not None
    assert loss_reason(EarlyStop(slope=99.0, slope_tokens=1000), seen) is None


REFUSED = [
    ({"tokens": 0}, "stages.0.until.tokens is 0; it must be at least 1"),
    ({"loss": -1.0}, "stages.0.until.loss is -1.0; it must be more than 0"),
    ({"slope": 0.1}, "stages.0.until.slope is 0.1, which has no effect while"),
]


@pytest.mark.parametrize(("fields", "message"), REFUSED)
def test_invalid_early_stopping_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        with_until(tiny_run(), 0, **fields)


def with_until(config, stage, **fields):
    stages = list(config.stages)
    stages[stage] = dataclasses.replace(stages[stage], until=EarlyStop(**fields))
    return dataclasses.replace(config, stages=tuple(stages))


LATE = [
    (0, {"tokens": 10**9}, r"stages.0.until.tokens is 1000000000, which has no effect while"),
    (1, {"flops_6nd": 1e30}, r"stages.1.until.flops_6nd is 1e\+30, which has no effect while"),
    (1, {"tokens": 5}, r"stages.1.until.tokens is 5, and the stages before it take \d+; it"),
    (1, {"flops_6nd": 5.0}, r"stages.1.until.flops_6nd is 5, and the stages before it take"),
    (
        0,
        {"slope": 0.1, "slope_tokens": 2},
        r"stages.0.until.slope_tokens is 2, and evaluations",
    ),
]


@pytest.mark.parametrize(("stage", "fields", "message"), LATE)
def test_early_stopping_without_effect_is_refused_at_launch(tmp_path, stage, fields, message):
    config = with_until(tiny_run(tmp_path), stage, **fields)
    with pytest.raises(ValueError, match=message):
        check(config, 8)


def test_early_end_keeps_planned_learning_rates(world):
    config = world.config()
    planned = expand(config)
    first, second = expand(config, RunHistory(ended={0: EarlyEnd(steps=3, reason="enough")}))
    assert first == dataclasses.replace(planned[0], num_steps=3)
    start = planned[0].start.after(planned[0].per_step, 3)
    waypoint = Waypoint(step=0, counts=start)
    assert second == dataclasses.replace(planned[1], start=start, waypoint=waypoint)


def test_stage_steps_include_fit_steps(world):
    config = world.config()
    small, large = config.stages
    learned = dataclasses.replace(large, growth=Learn(2, fit_steps=3))
    config = dataclasses.replace(config, stages=(small, learned))
    _, fit, fitted = expand(config, RunHistory(ended={1: EarlyEnd(steps=5, reason="enough")}))
    assert (fit.num_steps, fitted.num_steps) == (3, 2)


# Whole runs.


def of_kind(workdir, kind):
    return [row for row in rows(workdir) if row["kind"] == kind]


def run(world, workdir, *, first=8, axis="stage", **until):
    """A run with two stages, evaluated every two steps; the first may end early."""
    config = world.config("--evaluation.every-tokens", str(2 * STEP), workdir=workdir)
    schedule = Schedule(horizon_tokens=32 * STEP, axis=axis)
    stages = [dataclasses.replace(stage, schedule=schedule) for stage in config.stages]
    stages[0] = dataclasses.replace(stages[0], tokens=first * STEP, until=EarlyStop(**until))
    return dataclasses.replace(config, stages=tuple(stages))


def test_stage_ended_early_equals_planned_stage_bit_for_bit(world, tmp_path):
    planned, early = tmp_path / "planned", tmp_path / "early"
    # Both runs have the same learning rates.
    train(rarely_saved(run(world, planned, first=4, axis="run")))
    [before] = of_kind(planned, "growth")
    earlier = of_kind(planned, "evaluation")[0]["held_out_loss"]
    assert earlier > before["held_out_loss_before"]
    config = rarely_saved(run(world, early, axis="run", loss=before["held_out_loss_before"]))
    train(config)
    [ending] = of_kind(early, "trigger")
    assert (ending["tokens"], ending["step"], ending["stage"]) == (4 * STEP, 4, 0)
    assert ending["reason"].startswith("the held-out loss is")
    # The early end has an evaluation row besides.
    found = [row for row in rows(early) if row["kind"] != "trigger"]
    assert [row for row in found if row not in rows(planned)] == [
        row for row in found if row["kind"] == "evaluation" and row["tokens"] == 4 * STEP
    ]
    assert [row for row in rows(planned) if row not in found] == []
    jax.tree.map(np.testing.assert_array_equal, last_state(early, 1), last_state(planned, 1))
    train(config)
    assert len(of_kind(early, "trigger")) == 1


def test_run_ended_early_is_finished(world, tmp_path, capsys):
    config = rarely_saved(with_until(run(world, tmp_path), 1, tokens=10 * STEP + 1))
    train(config)
    [ending] = of_kind(tmp_path, "trigger")
    assert ending["tokens"] == 11 * STEP
    # The run's end is evaluated also between intervals.
    assert of_kind(tmp_path, "evaluation")[-1]["tokens"] == 11 * STEP
    capsys.readouterr()
    train(config)
    said = capsys.readouterr().out
    assert f"stage 1 ended early: the run has trained on {10 * STEP + 1:,} tokens" in said
    assert "This run is finished" in said


@pytest.mark.slow
def test_stage_does_not_end_before_masks_are_open(world, tmp_path):
    config = with_until(run(world, tmp_path), 1, tokens=9 * STEP)
    small, large = config.stages
    masked = dataclasses.replace(large, growth=DepthRandom(2, mask_tokens=4 * STEP))
    train(dataclasses.replace(config, stages=(small, masked)))
    [ending] = of_kind(tmp_path, "trigger")
    assert ending["tokens"] == 12 * STEP


MARK, SAVE = "stackjax.run.run:write_history", "stackjax.checkpoint.save:Checkpoints.save"
KILLS = [
    (MARK, "before", 1, False),
    (MARK, "after", 1, True),
    # The early end is committed, without a checkpoint yet.
    (SAVE, "before", 1, True),
    ("stackjax.training.compile:enter_phase", "before", 1, True),
]


# After a kill, earlier evaluations are read from the rows.
PLATEAU = ["--stages.0.until.slope", "9", "--stages.0.until.slope-tokens", str(3 * STEP)]
PLATEAU += ["--evaluation.every-tokens", str(STEP)]


@pytest.mark.slow
def test_run_killed_at_early_end_resumes_bit_for_bit(world, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    # Logging is not due at the early end. A save waits for the save before, so a checkpoint
    # is complete before the stage ends.
    overrides = [*PLATEAU, "--logging.every-tokens", "384", "--checkpoints.every-tokens", "128"]
    assert world.run(world.args(whole, *overrides))[0] == 0
    args = world.args(killed, *overrides)
    for point, when, nth, is_marked in KILLS:
        code, _, stderr = world.run(args, "SIGKILL", point, when, str(nth))
        assert (code, stderr) == (-9, ""), f"{when} call {nth} of {point}"
        ended = json.loads((killed / "phase.json").read_text())["ended"]
        assert {stage: ending["steps"] for stage, ending in ended.items()} == (
            {"0": 4} if is_marked else {}
        )
    assert world.run(args)[0] == 0
    assert rows(killed) == rows(whole)
    assert len(of_kind(killed, "trigger")) == 1
    states = [last_state(path, 1) for path in (killed, whole)]
    jax.tree.map(np.testing.assert_array_equal, *states)


def interrupt(config, monkeypatch, point, nth):
    """Trains until a function of `stackjax.run` has been called for the nth time."""
    module, name = point.split(":")
    owner = importlib.import_module(module)
    for part in name.split(".")[:-1]:
        owner = getattr(owner, part)
    name, calls = name.split(".")[-1], itertools.count(1)
    function = getattr(owner, name)

    def call(*args, **kwargs):
        function(*args, **kwargs)
        if next(calls) == nth:
            raise InterruptedError(point)

    with monkeypatch.context() as patch, pytest.raises(InterruptedError):
        patch.setattr(owner, name, call)
        train(config)


@pytest.mark.slow
def test_run_without_checkpoint_does_not_constrain_the_next(world, tmp_path, monkeypatch):
    plain, again = tmp_path / "plain", tmp_path / "again"
    train(run(world, plain))
    interrupt(run(world, again, tokens=STEP), monkeypatch, MARK, 1)
    assert not list(again.glob("stage_*/train/*"))
    interrupt(run(world, again), monkeypatch, SAVE, 2)
    train(run(world, again))
    assert rows(again) == rows(plain)
    jax.tree.map(np.testing.assert_array_equal, last_state(again, 1), last_state(plain, 1))


def test_probe_after_early_end_is_skipped(world, tmp_path, monkeypatch):
    probes = ProbeConfig(at_tokens=(2 * STEP, 6 * STEP), lag_tokens=STEP)
    config = dataclasses.replace(run(world, tmp_path, tokens=4 * STEP), probes=probes)
    interrupt(config, monkeypatch, MARK, 2)
    train(config)
    assert [row["tokens"] for row in of_kind(tmp_path, "probe")] == [2 * STEP]


@pytest.mark.slow
def test_early_end_has_a_train_row(world, tmp_path):
    for every, workdir in ((STEP, tmp_path / "all"), (3 * STEP, tmp_path / "some")):
        config = with_until(run(world, workdir), 1, tokens=10 * STEP + 1)
        logging = dataclasses.replace(config.logging, every_tokens=every)
        train(dataclasses.replace(config, logging=logging))
        tokens = [row["tokens"] for row in of_kind(workdir, "train")]
        expected = {*range(every, 11 * STEP, every), 8 * STEP, 11 * STEP}
        assert tokens == sorted(expected)
        assert rows(workdir)[-1]["kind"] == "trigger"
        # Every train row took some time.
        seconds = read_record(workdir).curve("held_out").costs["device_seconds"]
        assert (np.diff(seconds) > 0).all()
