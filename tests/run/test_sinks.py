"""Rows occur once across restarts, in every sink."""

import json
import math
import os
import struct
import sys
import types

import jax
import pytest
from conftest import tiny_run
from etils import epath
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorboardX import record_writer
from tensorboardX.proto import event_pb2

from stackjax.config import LoggingConfig
from stackjax.files import rows_file
from stackjax.files.rows_file import NO_ROWS, read_rows
from stackjax.run import sinks


def build_row(phase, tokens, **numbers):
    row = {"kind": "train", "phase": phase, "stage": 0, "step": tokens // 2}
    return row | {"tokens": tokens} | (numbers or {"loss": 1 / (3 + tokens + phase)})


def write_run(directory, rows, kept=NO_ROWS):
    """Writes rows after `kept`; returns the extent."""
    log = sinks.MetricsLog(directory, kept)
    for row in rows:
        log.write(row)
    log.close()
    return log.extent


RUN = [
    *(build_row(0, tokens) for tokens in (0, 2, 4, 6)),
    build_row(0, 6, accuracy=0.5) | {"kind": "evaluation"},
    build_row(1, 6, loss_before=1.5) | {"kind": "growth"},
    *(build_row(1, tokens) for tokens in (8, 10, 12)),
    # Tokens may be equal in two phases.
    *(build_row(2, tokens) for tokens in (12, 14)),
]


@settings(deadline=None, max_examples=30)  # disks may be slow
@given(killed_after=st.integers(0, len(RUN)), restored=st.integers(0, len(RUN) - 1))
def test_run_killed_and_resumed_anywhere_has_every_row_once(
    tmp_path_factory, killed_after, restored
):
    directory = tmp_path_factory.mktemp("run")
    # All rows up to a checkpoint are flushed before it commits.
    at_checkpoint = write_run(directory, RUN[:restored])
    write_run(directory, RUN[restored:killed_after], at_checkpoint)
    write_run(directory, RUN[restored:], at_checkpoint)
    assert read_rows(directory) == RUN


def test_rows_after_restored_position_are_removed(tmp_path):
    kept = write_run(tmp_path, RUN[:3])
    write_run(tmp_path, RUN[3:], kept)
    sinks.MetricsLog(tmp_path, kept)
    assert read_rows(tmp_path) == RUN[:3]


def test_new_run_has_no_old_rows(tmp_path):
    write_run(tmp_path, RUN)
    sinks.MetricsLog(tmp_path, NO_ROWS)
    assert read_rows(tmp_path) == []


def test_incomplete_last_line_is_ignored(tmp_path):
    kept = write_run(tmp_path, RUN[:-1])
    path = tmp_path / "metrics.jsonl"
    write_run(tmp_path, RUN[-1:], kept)
    whole = path.read_bytes()
    last = whole.splitlines(keepends=True)[-1]
    for length in range(1, len(last) - 1):
        path.write_bytes(whole[: len(whole) - len(last) + length])
        assert read_rows(tmp_path) == RUN[:-1]
    write_run(tmp_path, RUN[-1:], kept)
    assert path.read_bytes() == whole


def test_damaged_line_is_named(tmp_path):
    write_run(tmp_path, RUN)
    path = tmp_path / "metrics.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], lines[1][:9], *lines[2:]]))
    with pytest.raises(ValueError, match=r"metrics\.jsonl is damaged at line 2"):
        read_rows(tmp_path)


@settings(deadline=None, max_examples=30)  # disks may be slow
@given(value=st.floats(allow_nan=False, allow_infinity=False))
def test_floats_keep_every_bit(tmp_path_factory, value):
    directory = tmp_path_factory.mktemp("run")
    kept = write_run(directory, [build_row(0, 2, loss=value)])
    write_run(directory, [], kept)
    (row,) = read_rows(directory)
    assert struct.pack("d", row["loss"]) == struct.pack("d", value)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nonfinite_floats_become_null(tmp_path, value):
    write_run(tmp_path, [build_row(0, 2, loss=value)])
    text = (tmp_path / "metrics.jsonl").read_text()

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    assert json.loads(text, parse_constant=refuse)["loss"] is None


def test_nonfinite_floats_in_lists_become_null(tmp_path):
    write_run(tmp_path, [build_row(0, 2, norm=[0.5, math.nan, math.inf])])
    assert read_rows(tmp_path)[0]["norm"] == [0.5, None, None]


def test_failed_append_keeps_old_rows(tmp_path, monkeypatch):
    log = sinks.MetricsLog(tmp_path, NO_ROWS)
    log.write(RUN[0])
    log.flush()

    def fail(descriptor):
        raise OSError(28, "No space left on device")

    log.write(RUN[1])
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        log.flush()
    assert read_rows(tmp_path) == RUN[:1]
    monkeypatch.undo()
    log.flush()
    assert read_rows(tmp_path) == RUN[:2]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_rows_are_written_every_few_seconds_and_on_flush(tmp_path, monkeypatch):
    clock = types.SimpleNamespace(now=100.0)
    monkeypatch.setattr(sinks, "time", types.SimpleNamespace(monotonic=lambda: clock.now))
    log = sinks.MetricsLog(tmp_path, NO_ROWS)
    log.write(RUN[0])
    assert read_rows(tmp_path) == []
    clock.now += 5
    log.write(RUN[1])
    assert read_rows(tmp_path) == RUN[:2]
    log.write(RUN[2])
    assert read_rows(tmp_path) == RUN[:2]
    log.flush()
    assert read_rows(tmp_path) == RUN[:3]


def test_bucket_gets_whole_objects(tmp_path, monkeypatch):
    (tmp_path / "bucket").mkdir()
    local = epath.Path(tmp_path / "bucket")
    monkeypatch.setattr(rows_file, "is_remote", lambda path: True)
    write_run(local, RUN)
    assert read_rows(local) == RUN
    assert [path.name for path in local.iterdir()] == ["metrics.jsonl"]


def read_scalars(directory):
    """Returns the scalars as (tag, step, value), and the purged steps."""
    scalars, purges = [], []
    for path in sorted(directory.glob("events.*")):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            event = event_pb2.Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]
            if event.HasField("session_log"):
                purges.append(event.step)
            for value in event.summary.value:
                scalars.append((value.tag, event.step, value.simple_value))
    return scalars, purges


def test_tensorboard_events_purge_stale_events(tmp_path):
    sink = sinks.TensorBoard(tmp_path, (1, 4))
    sink.write(build_row(1, 2**40, loss=0.5, flops=2.0**70, operator="Stack(2)", norm=[1.0]))
    sink.write(build_row(1, 2**41, accuracy=0.25) | {"kind": "evaluation"})
    sink.flush()
    sink.close()
    scalars, purges = read_scalars(tmp_path / "tensorboard")
    assert scalars == [
        ("train/loss", 2**40, 0.5),
        ("train/flops", 2**40, 2.0**70),
        ("evaluation/accuracy", 2**41, 0.25),
    ]
    assert purges == [5]


def logging(*, tensorboard=False, wandb_project=None):
    return LoggingConfig(every_tokens=64, tensorboard=tensorboard, wandb_project=wandb_project)


def test_missing_wandb_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(sinks.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install wandb"):
        sinks.check_sinks(logging(wandb_project="growth"), tmp_path)


def test_folder_named_wandb_is_not_the_package(tmp_path, monkeypatch):
    (tmp_path / "wandb").mkdir()
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(ValueError, match="pip install wandb"):
        sinks.check_sinks(logging(wandb_project="growth"), tmp_path)


def test_tensorboard_in_bucket_needs_client(monkeypatch):
    monkeypatch.setattr(record_writer, "GCS_ENABLED", False)
    with pytest.raises(ValueError, match="pip install google-cloud-storage"):
        sinks.check_sinks(logging(tensorboard=True), "gs://bucket/run")


class FakeWandb(types.ModuleType):
    """Records calls to Weights & Biases."""

    def __init__(self):
        super().__init__("wandb")
        self.runs = []
        self.rows = []

    def init(self, **settings):
        self.runs.append(settings)
        return types.SimpleNamespace(log=self.log, finish=lambda: None)

    def log(self, numbers, step):
        self.rows.append((numbers, step))


def test_resumed_run_continues_wandb_run(tmp_path, monkeypatch):
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    for resume_at in (None, (0, 2), None):
        sink = sinks.WeightsAndBiases(tmp_path, resume_at, "growth", {"seed": 0})
        sink.write(build_row(0, 4, loss=0.5))
        sink.close()
    first, resumed, afresh = (run["id"] for run in wandb.runs)
    assert first == resumed != afresh
    assert wandb.runs[0]["config"] == {"seed": 0}
    assert wandb.rows[0] == ({"train/loss": 0.5}, 4)


def test_only_process_0_opens_sinks(tmp_path, monkeypatch):
    config = tiny_run(logging=logging(tensorboard=True))
    first, other = tmp_path / "first", tmp_path / "other"
    opened = sinks.open_sinks(config, first, None, NO_ROWS)
    for sink in opened:
        sink.write(RUN[0])
        sink.flush()
        sink.close()
    assert [type(sink) for sink in opened] == [sinks.MetricsLog, sinks.TensorBoard]
    assert read_rows(first) == RUN[:1]
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    assert sinks.open_sinks(config, other, None, NO_ROWS) == []
    assert not other.exists()
