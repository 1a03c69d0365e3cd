"""Killed and stopped runs resume to the same bits."""

import random
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
# A save in the background, growth, and the commit of the next stage.
FEW_KILLS = [KILLS[1], KILLS[4], KILLS[6]]


def truncate_cache(world) -> None:
    for entry in (world.path / "compilation_cache").glob("jit_*-cache"):
        entry.write_bytes(entry.read_bytes()[: entry.stat().st_size // 2])


def newest(workdir) -> str | None:
    """The newest complete checkpoint."""
    found = [path for path in workdir.glob("stage_*/train/*") if path.name.isdigit()]
    order = sorted(found, key=lambda path: (path.parts[-3], int(path.name)))
    return str(order[-1].relative_to(workdir)) if order else None


@pytest.mark.parametrize(
    "kills", [FEW_KILLS, pytest.param(KILLS, marks=pytest.mark.slow)], ids=["few", "all"]
)
def test_killed_run_resumes_bit_for_bit(world, uncut, tmp_path, kills):
    args = world.args(tmp_path)
    for point, when, nth, expected in kills:
        code, _, stderr = world.run(args, "SIGKILL", point, when, str(nth))
        assert (code, stderr) == (-9, ""), f"{when} call {nth} of {point}"
        assert newest(tmp_path) in expected, f"{when} call {nth} of {point}"
    assert world.run(args)[0] == 0
    assert_same_run(tmp_path, uncut)


@pytest.mark.slow
def test_run_killed_at_random_moments_resumes_bit_for_bit(world, uncut, tmp_path):
    rng = random.Random(0)
    args = world.args(tmp_path)
    for _ in range(3):
        with world.start(args) as process:
            while not tmp_path.joinpath("config.json").exists():
                assert process.poll() is None, "it ended before it began"
                time.sleep(0.01)
            time.sleep(rng.uniform(1, 5))
            process.kill()
    truncate_cache(world)
    code, _, stderr = world.run(args)
    assert (code, stderr) == (0, "")
    assert_same_run(tmp_path, uncut)


STOPS = [
    ("SIGTERM", "stackjax.run.compile_ahead:compile_step", 0),
    ("SIGHUP", "stackjax.run.validation:eval_batches", 5),
    ("SIGINT", "stackjax.training.compile:enter_phase", 8),
]


@pytest.mark.parametrize(
    "stops", [STOPS[1:2], pytest.param(STOPS, marks=pytest.mark.slow)], ids=["one", "all"]
)
def test_stopped_run_resumes_bit_for_bit(world, uncut, tmp_path, stops):
    args = world.args(tmp_path)
    for number, point, step in stops:
        code, stdout, stderr = world.run(args, number, point, "before", "1")
        assert (code, stderr) == (143, "")
        assert "stopping: the run saves after this step and ends" in stdout
        last = stdout.splitlines()[-1]
        assert last.startswith(f"stopped and saved at {128 * step:,} tokens; resume with: ")
        assert last.endswith(" ".join(args))
    code, stdout, stderr = world.run(args)
    assert (code, stderr) == (0, "")
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
