"""Killed and stopped runs resume to the same bits."""

import random
import shutil
import time

import pytest
from runs import assert_same_run, rows

FINALIZE = "orbax.checkpoint._src.path.atomicity:AtomicRenameTemporaryPath.finalize"
SAVE = "stackjax.checkpoint.save:Checkpoints.save"

FLUSH = "stackjax.run.sinks:MetricsLog.flush"

# Each restart is killed later in the run: point, and the newest checkpoints possible then.
# Saves continue in the background.
KILLS = [
    ("stackjax.run.compile_ahead:compile_step", "after", 1, [None]),
    (SAVE, "after", 1, [None, "stage_0/train/3"]),
    (FLUSH, "before", 3, ["stage_0/train/3", "stage_0/train/6", "stage_0/train/8"]),
    (FINALIZE, "before", 1, ["stage_0/train/3", "stage_0/train/6", "stage_0/train/8"]),
    ("stackjax.training.compile:enter_phase", "after", 1, ["stage_0/train/8"]),
    (SAVE, "after", 1, ["stage_0/train/8", "stage_1/train/0"]),
    ("stackjax.run.run:write_history", "before", 1, ["stage_1/train/0"]),
    ("stackjax.run.run:write_history", "after", 1, ["stage_1/train/0"]),
    (SAVE, "after", 2, ["stage_1/train/1", "stage_1/train/4"]),
]
# Signal, point and the step after which the run saves.
STOPS = [
    ("SIGTERM", "stackjax.run.compile_ahead:compile_step", 0),
    ("SIGHUP", "stackjax.run.validation:eval_batches", 5),
    ("SIGINT", "stackjax.training.compile:enter_phase", 8),
]


def newest(workdir) -> str | None:
    """The newest complete checkpoint."""
    found = [path for path in workdir.glob("stage_*/train/*") if path.name.isdigit()]
    order = sorted(found, key=lambda path: (path.parts[-3], int(path.name)))
    return str(order[-1].relative_to(workdir)) if order else None


def kill(world, workdir, point, when, nth, expected):
    code, _, stderr = world.run(world.args(workdir), "SIGKILL", point, when, str(nth))
    assert (code, stderr) == (-9, ""), f"{when} call {nth} of {point}"
    assert newest(workdir) in expected, f"{when} call {nth} of {point}"


def stop(world, workdir, number, point, step):
    args = world.args(workdir)
    code, stdout, stderr = world.run(args, number, point, "before", "1")
    assert (code, stderr) == (143, "")
    assert "stopping: the run saves after this step and ends" in stdout
    last = stdout.splitlines()[-1]
    assert last.startswith(f"stopped and saved at {128 * step:,} tokens; resume with: ")
    assert last.endswith(" ".join(args))


def resume(world, workdir):
    code, _, stderr = world.run(world.args(workdir))
    assert (code, stderr) == (0, "")


def test_killed_run_resumes_bit_for_bit(world, uncut, tmp_path):
    # After growth, during a save in the background, before the commit of the next stage.
    kill(world, tmp_path, SAVE, "after", 4, ["stage_0/train/8", "stage_1/train/0"])
    resume(world, tmp_path)
    assert_same_run(tmp_path, uncut)


@pytest.mark.slow
def test_run_killed_at_every_point_resumes_bit_for_bit(world, uncut, tmp_path):
    for kill_at in KILLS:
        kill(world, tmp_path, *kill_at)
    resume(world, tmp_path)
    assert_same_run(tmp_path, uncut)


@pytest.mark.slow
def test_run_stopped_by_every_signal_resumes_bit_for_bit(world, uncut, tmp_path):
    for stop_at in STOPS:
        stop(world, tmp_path, *stop_at)
    resume(world, tmp_path)
    assert_same_run(tmp_path, uncut)


@pytest.mark.slow
def test_run_killed_at_random_moments_resumes_bit_for_bit(world, uncut, tmp_path):
    rng = random.Random(0)
    args = world.args(tmp_path)
    # Other tests read the shared cache, and would warn of incomplete entries.
    cache = shutil.copytree(world.path / "compilation_cache", tmp_path / "cache")
    for _ in range(3):
        with world.start(args, JAX_COMPILATION_CACHE_DIR=str(cache)) as process:
            while not tmp_path.joinpath("config.json").exists():
                assert process.poll() is None, "it ended before it began"
                time.sleep(0.01)
            time.sleep(rng.uniform(1, 5))
            process.kill()
    for entry in cache.glob("jit_*-cache"):
        entry.write_bytes(entry.read_bytes()[: entry.stat().st_size // 2])
    with world.start(args, JAX_COMPILATION_CACHE_DIR=str(cache)) as process:
        _, stderr = process.communicate()
    assert (process.returncode, stderr) == (0, "")
    assert_same_run(tmp_path, uncut)


def test_finished_run_prints_summary_without_training(world, uncut):
    before = {path: path.stat().st_mtime_ns for path in uncut.rglob("*")}
    code, stdout, stderr = world.run(world.args(uncut))
    assert (code, stderr) == (0, "")
    assert "growth into stage 1" in stdout
    assert "This run is finished. To train it longer, make its last stage longer" in stdout
    assert "--stages.1.tokens 2048; or start a new run with --workdir DIR." in stdout
    assert before == {path: path.stat().st_mtime_ns for path in uncut.rglob("*")}


def test_every_row_occurs_once(uncut):
    tokens = {"train": [], "evaluation": [], "growth": []}
    for row in rows(uncut):
        tokens[row["kind"]].append(row["tokens"])
    assert tokens["train"] == [128 * step for step in range(1, 17)]
    assert tokens["evaluation"] == [640, 1280, 1920, 2048]
    assert tokens["growth"] == [1024]
