"""Resuming with changes: recorded, and applied once across kills."""

import dataclasses
import json
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from runs import last_state, rows

from stackjax.checkpoint.directory import newest_step
from stackjax.checkpoint.restore import read_contents
from stackjax.config import Schedule
from stackjax.data.sources import read_manifest
from stackjax.options import ResumeConfig
from stackjax.run import compile_ahead, validation
from stackjax.run.resume import NEWEST, commit_position, find_position
from stackjax.run.train import train
from stackjax.runtime.errors import UserError
from stackjax.training.expand import expand
from stackjax.training.phase import Change, Waypoint
from stackjax.training.run_history import RunHistory, read_history

STEP = 128
"""Tokens per step: 8 sequences of 16."""


def eight_steps(world, workdir):
    """A run with one stage of eight steps, saved after steps 3 and 6."""
    config = world.config(workdir=workdir)
    constant = Schedule(shape="constant")
    return dataclasses.replace(
        config,
        model_is="source",
        stages=config.stages[:1],
        optimizer=dataclasses.replace(config.optimizer, schedule=constant),
    )


@pytest.fixture
def config(world, tmp_path):
    return eight_steps(world, tmp_path / "run")


@pytest.fixture(scope="module")
def trained_once(world, tmp_path_factory):
    config = eight_steps(world, tmp_path_factory.mktemp("trained") / "run")
    train(config)
    return config.workdir


@pytest.fixture
def trained(config, trained_once):
    """The run after its eight steps."""
    shutil.copytree(trained_once, config.workdir)
    return config


def start(workdir, config, options, manifest):
    """The committed position."""
    found = find_position(workdir, config, options)
    commit_position(workdir, config, found, [manifest])
    return found


def with_stage(config, **fields):
    """The run with changes in the last stage."""
    *before, last = config.stages
    return dataclasses.replace(config, stages=(*before, dataclasses.replace(last, **fields)))


def with_rate(config, rate):
    optimizer = dataclasses.replace(config.optimizer, peak_learning_rate=rate)
    return dataclasses.replace(config, optimizer=optimizer)


def read_examples(config, monkeypatch, options=NEWEST) -> list[tuple[int, int]]:
    """Trains; returns first example and batch size for each loader."""
    from stackjax.training import batches

    real, read = batches.train_batches, []

    def train_batches(*args, **kwargs):
        read.append((kwargs["first_example"], kwargs["batch_size"]))
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(batches, "train_batches", train_batches)
        train(config, options)
    return read


def changes(config) -> list[str]:
    return [
        row["change"] for row in rows(epath.Path(config.workdir)) if row["kind"] == "change"
    ]


def lineage(config):
    """The lineage in the run's newest checkpoint."""
    workdir = epath.Path(config.workdir)
    phase = expand(config, read_history(workdir))[-1]
    step = newest_step(workdir, phase)
    return read_contents(workdir / phase.directory / str(step)).lineage


def test_stopped_run_resumes_bit_for_bit(config, trained_once, monkeypatch, capfd):
    eval_batches = validation.eval_batches

    def stopping(*args, **kwargs):
        signal.raise_signal(signal.SIGTERM)
        return eval_batches(*args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="143"):
        patch.setattr(validation, "eval_batches", stopping)
        patch.setattr("sys.argv", ["train", "--workdir", "a run"])
        train(config)
    said = capfd.readouterr().out
    assert "stopping: the run saves after this step and ends" in said
    last = said.splitlines()[-1]
    assert last.startswith("stopped and saved at 640 tokens; resume with: ")
    assert last.endswith(" --workdir 'a run'")
    train(config)
    stopped, uncut = epath.Path(config.workdir), epath.Path(trained_once)
    assert rows(stopped) == rows(uncut)
    states = last_state(stopped, 0), last_state(uncut, 0)
    jax.tree.map(np.testing.assert_array_equal, *states)


def test_resume_with_new_rate_batch_size_and_length(trained, monkeypatch, capsys):
    longer = with_rate(with_stage(trained, tokens=16 * STEP, batch_size=16), 1e-3)
    assert read_examples(longer, monkeypatch) == [(8 * 8, 16)]
    # Eight steps of 8 sequences, then four of 16.
    steps = [row for row in rows(epath.Path(longer.workdir)) if row["kind"] == "train"]
    assert [row["step"] for row in steps] == list(range(1, 13))
    assert [row["tokens"] for row in steps][7:] == [n * STEP for n in (8, 10, 12, 14, 16)]
    assert [row["examples"] for row in steps][7:] == [64, 80, 96, 112, 128]
    rates = [row["learning_rate"] for row in steps]
    np.testing.assert_allclose(rates, [1e-2] * 8 + [1e-3] * 4, rtol=1e-6)
    [said] = changes(longer)
    for line in (
        "at 1,024 tokens: ",
        "optimizer.peak_learning_rate: 0.01 -> 0.001",
        "stages.0.batch_size: 8 -> 16",
        "stages.0.tokens: 1024 -> 2048",
    ):
        assert line in said
    [generation] = lineage(longer)
    assert generation.changes == (said,)
    assert (generation.spent.tokens, generation.spent.examples) == (16 * STEP, 128)
    # The same command again finds a finished run.
    capsys.readouterr()
    train(longer)
    assert "--stages.0.tokens 4096" in capsys.readouterr().out


def test_schedule_counts_tokens_across_batch_sizes(config):
    schedule = Schedule(shape="cosine", warmup_tokens=2 * STEP)
    optimizer = dataclasses.replace(config.optimizer, schedule=schedule)
    config = dataclasses.replace(config, optimizer=optimizer)
    [planned] = expand(config)
    at = planned.counts(4)
    history = RunHistory(waypoints={0: Waypoint(step=4, counts=at)})
    [wide] = expand(with_stage(config, batch_size=16), history)
    assert (wide.num_steps, wide.end.tokens) == (6, planned.end.tokens)
    # Equal tokens have equal rates.
    for steps, tokens in ((5, 6 * STEP), (6, 8 * STEP)):
        assert wide.counts(steps).tokens == tokens
        rate = float(planned.learning_rate(tokens // STEP - 1))
        assert float(wide.learning_rate(steps - 1)) == pytest.approx(rate)
    # A waypoint alone changes nothing.
    [same] = expand(config, history)
    assert dataclasses.replace(same, waypoint=planned.waypoint) == planned


def test_resume_from_and_skip_examples_happen_once(trained, monkeypatch):
    workdir = epath.Path(trained.workdir)
    back = ResumeConfig(resume_from="3", skip_examples=5)
    assert read_examples(trained, monkeypatch, back) == [(3 * 8 + 5, 8)]
    steps = [row for row in rows(workdir) if row["kind"] == "train"]
    assert [row["step"] for row in steps] == list(range(1, 9))
    assert [row["examples"] for row in steps] == [8, 16, 24, 37, 45, 53, 61, 69]
    assert changes(trained) == ["at 384 tokens: resumed from 3; 5 examples skipped"]
    # The same command again does not go back; a different command does.
    assert read_examples(trained, monkeypatch, back) == []
    again = ResumeConfig(resume_from="stage_0/train/3", skip_examples=8)
    assert read_examples(trained, monkeypatch, again) == [(32, 8)]
    assert len(lineage(trained)[0].changes) == 2
    skipped = last_state(tmp := workdir, 0)
    assert newest_step(tmp, expand(trained)[0]) == 8
    assert skipped["step"] == 8


@pytest.mark.sample(2)
@pytest.mark.parametrize("point", ["write_history", "record_config", "discard_after"])
def test_change_survives_a_kill(trained, point, monkeypatch, world):
    workdir, manifest = epath.Path(trained.workdir), read_manifest(trained.data.path)
    whole = epath.Path(shutil.copytree(trained.workdir, f"{trained.workdir}-whole"))
    changed = with_stage(trained, tokens=16 * STEP, batch_size=16)
    options = ResumeConfig(resume_from="3", skip_examples=5)
    start(whole, dataclasses.replace(changed, workdir=str(whole)), options, manifest)

    from stackjax.run import resume

    def killed(*args, **kwargs):
        raise InterruptedError(point)

    with monkeypatch.context() as patch, pytest.raises(InterruptedError):
        patch.setattr(resume, point, killed)
        start(workdir, changed, options, manifest)
    found = start(workdir, changed, options, manifest)
    assert found.history == dataclasses.replace(read_history(whole))
    assert found.step == 3
    assert newest_step(workdir, expand(changed)[0]) == 3
    # Repeated: no changes remain.
    again = start(workdir, changed, options, manifest)
    assert (again.history, again.changed) == (found.history, {})


@pytest.mark.slow
def test_resume_from_earlier_stage_grows_again(world, tmp_path):
    config = world.config(workdir=tmp_path / "run")
    train(config)
    workdir, manifest = epath.Path(config.workdir), read_manifest(config.data.path)
    before = last_state(workdir, 1, step=0)
    found = start(workdir, config, ResumeConfig(resume_from="stage_0/train/6"), manifest)
    assert (found.history.phase, found.history.directory, found.step) == (0, "stage_0/train", 6)
    assert set(found.history.waypoints) == {0}
    train(config)
    # Same data, same model.
    jax.tree.map(np.testing.assert_array_equal, before, last_state(workdir, 1, step=0))


@pytest.mark.slow
def test_stage_without_checkpoints_names_earlier_checkpoint(world, tmp_path):
    config = world.config(workdir=tmp_path / "run")
    train(config)
    workdir, before = epath.Path(config.workdir), last_state(tmp_path / "run", 1, step=0)
    (workdir / "stage_1").rmtree()
    with pytest.raises(UserError, match=r"go back with --resume-from stage_0/train/8, or"):
        train(config)
    train(config, ResumeConfig(resume_from="stage_0/train/8"))
    jax.tree.map(np.testing.assert_array_equal, before, last_state(tmp_path / "run", 1, step=0))


REFUSED = [
    (ResumeConfig(resume_from="4"), "--resume-from is '4'"),
    (ResumeConfig(resume_from="stage_1/train/3"), "--resume-from is 'stage_1/train/3'"),
    (ResumeConfig(resume_from="../run/stage_0/train/3"), "--resume-from is '\\.\\./run"),
    (ResumeConfig(resume_from="x"), "--resume-from is 'x'"),
]


@pytest.mark.sample(3)
@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_missing_checkpoint_is_refused(trained, options, message):
    manifest = read_manifest(trained.data.path)
    with pytest.raises(UserError, match=message):
        start(epath.Path(trained.workdir), trained, options, manifest)
    assert read_history(epath.Path(trained.workdir)).changes == ()


def test_new_run_refuses_resume_options(config):
    workdir, manifest = epath.Path(config.workdir), read_manifest(config.data.path)
    with pytest.raises(UserError, match="--skip-examples"):
        start(workdir, config, ResumeConfig(skip_examples=3), manifest)
    assert find_position(workdir, config, NEWEST).step is None


def test_stage_cannot_end_before_present_step(trained):
    with pytest.raises(UserError, match=r"come to 1,024 already; give the stage more tokens"):
        find_position(epath.Path(trained.workdir), with_stage(trained, tokens=3 * STEP), NEWEST)


def test_change_as_text():
    change = Change(phase=0, step=3, tokens=9000, fields=("seed: 0 -> 1",), skip_examples=2000)
    assert str(change) == "at 9,000 tokens: seed: 0 -> 1; 2,000 examples skipped"


def poisoned(compile_step, at: int, value: float):
    """Train steps; at step `at` the parameters are multiplied by `value`."""

    def compile_poisoned(config, phase):
        step = compile_step(config, phase)

        def run(inputs, state, batch):
            if int(state.step) == at:
                norm = state.params["final_norm"]
                spoilt = {**state.params, "final_norm": norm * jnp.float32(value)}
                state = dataclasses.replace(state, params=spoilt)
            return step(inputs, state, batch)

        return run

    return compile_poisoned


def test_step_with_nan_is_not_taken(config, monkeypatch, capsys):
    workdir = epath.Path(config.workdir)
    with monkeypatch.context() as patch:
        patch.setattr(
            compile_ahead, "compile_step", poisoned(compile_ahead.compile_step, 7, float("nan"))
        )
        with pytest.raises(FloatingPointError) as error:
            train(config)
    said = str(error.value)
    assert "loss nan, gradient norm nan at learning rate 0.01 in step 8 of stage 0" in said
    assert f"the last good checkpoint is {workdir}/stage_0/train/6" in said
    assert "--skip-examples 16" in said
    assert newest_step(workdir, expand(config)[0]) == 6
    assert max(row["tokens"] for row in rows(workdir)) == 7 * STEP
    train(with_rate(config, 5e-3), ResumeConfig(skip_examples=16))
    assert newest_step(workdir, expand(config)[0]) == 8
    record = json.loads((workdir / "config.json").read_text())
    assert record["config"]["optimizer.peak_learning_rate"] == 5e-3
