"""Detection of damaged run files."""

import itertools
import json
import random
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import mesh_of, tiny_model, tiny_run
from etils import epath

from stackjax.checkpoint.directory import discard_after, newest_step
from stackjax.checkpoint.restore import check_rows_of, load_part, load_whole
from stackjax.checkpoint.save import Checkpoints
from stackjax.checkpoint.saved_state import DamagedError, load_state, read_contents
from stackjax.config import CheckpointConfig, Stage
from stackjax.config_record import config_record, read_config_record
from stackjax.files.json_file import seal
from stackjax.files.rows_file import NO_ROWS, read_rows
from stackjax.inference.run_tokenizer import read_run_tokenizer, write_run_tokenizer
from stackjax.run.resume import read_or_go_back
from stackjax.run.sinks import MetricsLog
from stackjax.runtime.errors import UserError
from stackjax.tokenizer.tokenizer import load_tokenizer
from stackjax.training.expand import expand
from stackjax.training.phase import Counts, EarlyEnd
from stackjax.training.run_history import (
    RunHistory,
    after_entering,
    check_phase,
    read_history,
    write_history,
)
from stackjax.training.train_state import TrainState

RUN = tiny_run(model=tiny_model(num_layers=2), stages=(Stage(tokens=640, batch_size=8),))
(PHASE,) = expand(RUN)
KEEP = CheckpointConfig(every_tokens=64, keep_last=9)
COUNTS = Counts(tokens=256, examples=32, flops_6nd=10**22, flops=2**70 + 1)


def state_of(step: int) -> TrainState:
    """Returns a small state; the arrays are too large for an index."""
    rng = np.random.default_rng(step)
    w = jnp.asarray(rng.normal(size=(40, 30)), jnp.float32)
    b = jnp.asarray(rng.normal(size=(900,)), jnp.bfloat16)
    return TrainState(jnp.int32(step), {"b": b, "w": w}, {"mu": {"b": b + 1, "w": w + 1}})


def abstract():
    return jax.eval_shape(lambda: state_of(0))


def saved(workdir, steps=(2, 4), phase=PHASE):
    """Returns a run directory with checkpoints at these steps."""
    with (
        jax.set_mesh(mesh_of("one device")),
        Checkpoints(workdir, phase, KEEP) as checkpoints,
    ):
        for step in steps:
            checkpoints.save(step, state_of(step), COUNTS)
    return workdir


def restored(workdir, step=None):
    mesh, step = mesh_of("one device"), step or newest_step(workdir, PHASE)
    with jax.set_mesh(mesh):
        return read_or_go_back(
            workdir, [PHASE], step, lambda path: load_whole(path, abstract(), mesh)
        )


def assert_same(state, expected):
    assert jax.tree.structure(state) == jax.tree.structure(expected)
    for leaf, other in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
        assert np.asarray(leaf).tobytes() == np.asarray(other).tobytes()


def with_flipped_bit(data: bytes, bit: int) -> bytes:
    flipped = bytearray(data)
    flipped[bit // 8] ^= 1 << bit % 8
    return bytes(flipped)


WHOLE_FILE = {
    "gone": lambda data: None,
    "empty": lambda data: b"",
    "half": lambda data: data[: len(data) // 2],
    "zeros": lambda data: bytes(len(data)),
}


def damages(data: bytes, rng: random.Random, kinds=tuple(WHOLE_FILE), flips: int = 1):
    """Yields a name and damaged bytes, or None for a deleted file."""
    for kind in kinds:
        yield kind, WHOLE_FILE[kind](data)
    for _ in range(flips if data else 0):
        bit = rng.randrange(8 * len(data))
        yield f"bit {bit}", with_flipped_bit(data, bit)


@pytest.mark.slow
def test_damaged_checkpoint_file_is_reported_or_has_no_effect(tmp_path):
    checkpoint = Path(saved(epath.Path(tmp_path), [4]) / PHASE.directory / "4")
    mesh, rng, named = mesh_of("one device"), random.Random(0), 0

    def outcome() -> str:
        try:
            state, contents = load_whole(epath.Path(checkpoint), abstract(), mesh)
        except DamagedError as error:
            message = str(error)
            assert message.startswith(f"{checkpoint} is damaged: ")
            assert "\n" not in message and len(message) < 600
            return "named"
        assert contents.counts == COUNTS
        assert_same(state, state_of(4))
        return "the same"

    with jax.set_mesh(mesh):
        # A load takes 0.2 s, so two of the four kinds for each file.
        pairs = itertools.cycle([("gone", "half"), ("empty", "zeros")])
        files = sorted(p for p in checkpoint.rglob("*") if p.is_file())
        for path, kinds in zip(files, pairs, strict=False):
            whole = path.read_bytes()
            for _, data in damages(whole, rng, kinds):
                path.unlink() if data is None else path.write_bytes(data)
                named += outcome() == "named"
                path.write_bytes(whole)
        for path in [p for p in checkpoint.rglob("*") if p.is_dir()]:
            path.rename(tmp_path / "away")
            outcome()
            (tmp_path / "away").rename(path)
        assert outcome() == "the same"
    assert named > 10


def test_failed_read_silences_only_its_own_late_errors(tmp_path, monkeypatch):
    checkpoint = saved(epath.Path(tmp_path), [4]) / PHASE.directory / "4"
    shown = []
    monkeypatch.setattr(sys, "unraisablehook", shown.append)
    (checkpoint / "_CHECKPOINT_METADATA").write_text("{")
    for _ in range(2):
        with pytest.raises(DamagedError):
            read_contents(checkpoint)
    late, other = RuntimeError("Event loop is closed"), RuntimeError("a bug")
    for error in (late, other):
        sys.unraisablehook(SimpleNamespace(exc_value=error))
    assert [each.exc_value for each in shown] == [other]


def corrupt(checkpoint: epath.Path) -> None:
    """Zeroes the middle of a checkpoint's largest file, the array file."""
    files = [path for path in Path(checkpoint).rglob("*") if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    data = bytearray(largest.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 8] = bytes(8)
    largest.write_bytes(bytes(data))


def test_damaged_checkpoint_is_reported_with_the_newest_readable_one(tmp_path):
    workdir = saved(epath.Path(tmp_path), [1, 2, 3])
    directory = workdir / PHASE.directory
    for step in (2, 3):
        corrupt(directory / str(step))
    way_out = "add --resume-from stage_0/train/1, the newest before it that can be read."
    with pytest.raises(UserError, match=rf"train/3 is damaged: .*; {re.escape(way_out)}$"):
        restored(workdir)
    state, contents = restored(workdir, step=1)
    assert_same(state, state_of(1))
    assert contents.counts == COUNTS
    corrupt(directory / "1")
    with pytest.raises(UserError, match=r"no checkpoint before it can be read: start a new"):
        restored(workdir)


def test_stage_without_readable_checkpoint_offers_the_stage_before(tmp_path):
    phases = expand(tiny_run())
    workdir = saved(saved(epath.Path(tmp_path), [2, 4], phases[0]), [3, 5], phases[1])
    first, second = (workdir / phase.directory for phase in phases)

    def advice() -> str:
        mesh = mesh_of("one device")
        with pytest.raises(UserError, match="train/5 is damaged") as error, jax.set_mesh(mesh):
            read_or_go_back(workdir, phases, 5, lambda path: load_whole(path, abstract(), mesh))
        return str(error.value).rpartition("; ")[2]

    for checkpoint, expected in (
        (second / "5", "add --resume-from stage_1/train/3, the newest before it"),
        (second / "3", "add --resume-from stage_0/train/4, the newest before it"),
        (first / "4", "add --resume-from stage_0/train/2, the newest before it"),
        (first / "2", "no checkpoint before it can be read: start a new run"),
    ):
        corrupt(checkpoint)
        assert advice().startswith(expected)


def test_array_with_a_flipped_bit_is_reported_by_path(tmp_path, monkeypatch):
    workdir = saved(epath.Path(tmp_path), [4])
    load = load_state.__globals__["ocp"].load

    def flip(path, tree):
        loaded = load(path, tree)
        w = np.array(loaded["params"]["w"])
        w.view(np.uint32)[7, 3] ^= 1
        loaded["params"]["w"] = jnp.asarray(w)
        return loaded

    monkeypatch.setattr(load_state.__globals__["ocp"], "load", flip)
    with pytest.raises(UserError, match=r"4 is damaged: params.w does not match its checksum;"):
        restored(workdir)


def test_partial_load_verifies_only_the_loaded_arrays(tmp_path):
    checkpoint = saved(epath.Path(tmp_path)) / PHASE.directory / "4"
    mesh = mesh_of("one device")

    def part(name):
        whole = abstract()
        wanted = TrainState(whole.step, {name: whole.params[name]}, None)
        return load_part(checkpoint, wanted, mesh).params[name]

    with jax.set_mesh(mesh):
        assert part("w").tobytes() == state_of(4).params["w"].tobytes()
        corrupt(checkpoint)
        results = []
        for name in ("w", "b"):
            try:
                found = part(name)
                assert found.tobytes() == state_of(4).params[name].tobytes()
            except UserError as error:
                assert re.search(
                    r"damaged: .*; name .*/2, the newest before it that can", str(error)
                )
                results.append(name)
        whole = abstract()
        with pytest.raises(UserError, match="is damaged"):
            load_part(checkpoint, whole, mesh)


@pytest.mark.parametrize("killed_at", [None, 0, 1])
def test_resuming_from_an_older_checkpoint_removes_later_ones(tmp_path, monkeypatch, killed_at):
    workdir = saved(epath.Path(tmp_path), [1, 2, 3, 4])
    with jax.set_mesh(mesh_of("one device")):
        if killed_at is not None:
            calls = iter(range(9))
            rmtree = type(workdir).rmtree

            def killed(path, *args):
                if next(calls) == killed_at:
                    raise KeyboardInterrupt
                rmtree(path, *args)

            with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
                patch.setattr(type(workdir), "rmtree", killed)
                discard_after(workdir, PHASE, 2)
            # The newest checkpoints are deleted and the rest are readable.
            assert newest_step(workdir, PHASE) == (3, 2)[killed_at]
            restored(workdir)
        discard_after(workdir, PHASE, 2)
        with Checkpoints(workdir, PHASE, KEEP) as checkpoints:
            assert checkpoints.latest_step == 2
            checkpoints.save(3, state_of(30), COUNTS)
        assert_same(restored(workdir)[0], state_of(30))
    names = {path.name for path in (workdir / PHASE.directory).iterdir()}
    assert names == {"1", "2", "3"}


def test_damaged_older_checkpoint_is_reported_on_resume(tmp_path):
    workdir = saved(epath.Path(tmp_path))
    metadata = workdir / PHASE.directory / "2" / "_CHECKPOINT_METADATA"
    metadata.write_text(metadata.read_text().replace("init_timestamp", "xnit_timestamp"))
    with (
        pytest.raises(UserError, match=r"train/2 is damaged: .*; remove this directory"),
        Checkpoints(workdir, PHASE, KEEP),
    ):
        pass


ROWS = [
    {"kind": "train", "phase": 0, "stage": 0, "step": i, "tokens": 64 * i, "loss": 1 / (i + 1)}
    for i in range(1, 6)
]


@pytest.fixture
def run(tmp_path):
    """A run with four rows before the newest checkpoint and a fifth row after."""
    workdir = epath.Path(tmp_path)
    log = MetricsLog(workdir, NO_ROWS)
    for row in ROWS[:4]:
        log.write(row)
    log.flush()
    with (
        jax.set_mesh(mesh_of("one device")),
        Checkpoints(workdir, PHASE, KEEP) as checkpoints,
    ):
        checkpoints.save(4, state_of(4), COUNTS, log.extent)
    log.write(ROWS[4])
    log.close()
    ended = {0: EarlyEnd(steps=4, reason="enough")}
    write_history(workdir, after_entering(RunHistory(ended=ended), None, PHASE))
    return workdir


def lines(data: bytes) -> list[bytes]:
    return data.splitlines(keepends=True)


# Damage to rows before the checkpoint.
ROW_DAMAGES = {
    "gone": None,
    "empty": lambda data: b"",
    "cut": lambda data: data[: len(data) // 3],
    "fewer rows": lambda data: b"".join(lines(data)[:3]),
    "a row is missing": lambda data: b"".join([lines(data)[0], *lines(data)[2:]]),
    "a row twice": lambda data: b"".join([lines(data)[0], *lines(data)]),
    "rows in another order": lambda data: b"".join(reversed(lines(data))),
    "another number": lambda data: data.replace(b"0.5", b"0.7"),
    "NUL bytes": lambda data: bytes(len(data)),
    "invalid UTF-8": lambda data: data.replace(b"train", b"tr\xffin", 1),
    "not finite": lambda data: data.replace(b"0.5", b"NaN"),
    "text for a number": lambda data: data.replace(b"0.5", b'"0.5"'),
    "a list": lambda data: b"[]\n" + data,
}


@pytest.mark.parametrize("name", ROW_DAMAGES)
def test_damaged_rows_before_a_checkpoint_are_reported(run, name):
    path, damage = run / "metrics.jsonl", ROW_DAMAGES[name]
    check_rows_of(run)
    extent = restored(run)[1].rows
    data = path.read_bytes()
    path.unlink() if damage is None else path.write_bytes(damage(data))
    for check in (lambda: check_rows_of(run), lambda: MetricsLog(run, extent)):
        with pytest.raises(
            UserError, match=r"metrics.jsonl (has|is damaged).*--resume-from"
        ) as e:
            check()
        assert "\n" not in str(e.value)
    path.write_bytes(data)
    MetricsLog(run, extent)
    assert read_rows(run) == ROWS[:4]


MALFORMED = {
    "not an object": (b"3\n", "it is 3"),
    "a field is missing": (b'{"kind": "train"}\n', "phase is missing"),
    "a fraction": (json.dumps(ROWS[0] | {"step": 1.5}).encode() + b"\n", "step is '1.5'"),
    "a boolean": (json.dumps(ROWS[0] | {"tokens": True}).encode() + b"\n", "tokens is 'True'"),
    "an object": (json.dumps(ROWS[0] | {"loss": {}}).encode() + b"\n", "loss is '{}'"),
    "a list for a kind": (
        json.dumps(ROWS[0] | {"kind": []}).encode() + b"\n",
        r"kind is '\[\]'",
    ),
    "too deep": (b"[" * 100_000 + b"\n", "nested too deeply"),
    "too many digits": (b'{"tokens": ' + b"1" * 5000 + b"}\n", "the number 1111"),
    "a name twice": (b'{"kind": 1, "kind": 2}\n', "same name twice"),
    "a missing number": (json.dumps(ROWS[0]).encode() + b"\n", "flops in a row"),
    "a repetition": (2 * (json.dumps(ROWS[0] | {"flops": 1}).encode() + b"\n"), "it repeats"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_row_is_reported_by_line_number(tmp_path, name):
    data, message = MALFORMED[name]
    (tmp_path / "metrics.jsonl").write_bytes(data)
    with pytest.raises(UserError, match=rf"metrics.jsonl is damaged at line \d: .*{message}"):
        read_rows(tmp_path, {"train": ("flops",)})


def test_directory_in_place_of_a_file_is_a_user_error(tmp_path):
    for name, read in {"metrics.jsonl": read_rows, "phase.json": read_history}.items():
        (tmp_path / name).mkdir()
        with pytest.raises(UserError, match=f"{name} is"):
            read(epath.Path(tmp_path))
    with pytest.raises(UserError, match="is damaged"):
        read_config_record(tmp_path)


def test_flipped_bit_in_the_marker_is_reported_or_has_no_effect(run):
    path, expected = run / "phase.json", read_history(run)
    data, refused = path.read_bytes(), 0
    for bit in range(0, 8 * len(data), 5):
        path.write_bytes(with_flipped_bit(data, bit))
        try:
            assert read_history(run) == expected
        except UserError as error:
            assert "\n" not in str(error)
            refused += 1
    assert refused > len(data)


@pytest.mark.parametrize(
    ("history", "message"),
    [
        ({"phase": 1, "directory": "../x"}, "no phase directory"),
        ({"phase": 1, "directory": "/etc"}, "no phase directory"),
        ({"phase": 1, "directory": "stage_1/train/../../.."}, "no phase directory"),
        ({"phase": "1", "directory": "stage_1/train"}, "phase is '1', which is not an integer"),
        ({"phase": 1, "directory": 3}, "directory is 3, which is not a text"),
        ({"phase": 1, "directory": "stage_1/train", "ended": []}, "ended is .*not an object"),
        (
            {"phase": 1, "directory": "stage_1/train", "ended": {"x": 1}},
            "the key 'x' of ended is 'x', which is not an integer",
        ),
        (
            {"phase": 1, "directory": "stage_1/train", "ended": {"0": {"steps": 1}}},
            "ended.0.reason is missing",
        ),
        ({"phase": 1, "directory": "stage_1/train", "more": 1}, "more is not a known field"),
    ],
)
def test_invalid_history_is_refused_with_field_and_value(tmp_path, history, message):
    (tmp_path / "phase.json").write_text(json.dumps(seal(history)))
    with pytest.raises(UserError, match=message):
        read_history(epath.Path(tmp_path))


def test_missing_marker_of_a_later_stage_is_reported(tmp_path):
    (tmp_path / "stage_1" / "train").mkdir(parents=True)
    with pytest.raises(UserError, match=r"has a stage_1, but no phase.json; bring"):
        read_history(epath.Path(tmp_path))


def test_phase_missing_from_the_config_is_rejected(tmp_path):
    phases, workdir = expand(tiny_run()), epath.Path(tmp_path)
    for phase in phases:
        check_phase(workdir, RunHistory(phase.index, phase.directory), phases)
    check_phase(workdir, RunHistory(), phases)
    for history in (RunHistory(7, "stage_7/train"), RunHistory(0, "stage_1/train")):
        with pytest.raises(
            UserError, match=r"is in stage_\d/train, but the config has stage_0"
        ):
            check_phase(workdir, history, phases)


RECORDS = {
    "empty": (b"", "not JSON"),
    "cut": (b'{"config": {"seed": 0', "not JSON"),
    "a list": (b"[]", r"it is \[\]"),
    "no config": (b'{"data": "a", "tokenizer": "b"}', "config is missing"),
    "config of another type": (b'{"config": 3, "data": "a", "tokenizer": "b"}', "config is"),
    "a nested object": (b'{"config": {"seed": {}}, "data": "a", "tokenizer": "b"}', "seed is"),
    "no data": (b'{"config": {"seed": 0}, "tokenizer": "b"}', "data is missing"),
    "an unknown field": (
        b'{"config": {"seed": 0}, "data": "a", "tokenizer": "b", "dat": ""}',
        "dat is not a known field",
    ),
    "no tokenizer": (b'{"config": {"seed": 0}, "data": "b"}', "tokenizer is missing"),
    "invalid UTF-8": (b'{"config": {"seed": "\xff"}}', "not UTF-8"),
    "NUL": (bytes(9), "not JSON"),
}


@pytest.mark.parametrize("name", RECORDS)
def test_damaged_config_record_is_reported(tmp_path, name):
    data, message = RECORDS[name]
    (tmp_path / "config.json").write_bytes(data)
    with pytest.raises(UserError, match=rf"config.json is damaged: .*{message}.*; bring the"):
        read_config_record(tmp_path / "config.json")
    with pytest.raises(UserError, match=r"config.json is missing; bring the file back"):
        read_config_record(tmp_path / "other" / "config.json")


def test_flipped_bit_in_a_record_is_reported_or_has_no_effect(tmp_path):
    record = {"config": {"seed": 0, "stages.0.tokens": 640}, "data": "a1", "tokenizer": "b"}
    (tmp_path / "config.json").write_text(config_record(record))
    config, info = tmp_path / "config.json", tmp_path / "tokenizer" / "info.json"
    write_run_tokenizer(load_tokenizer("bytes"), epath.Path(info.parent))
    readers = {
        config: lambda: read_config_record(config),
        info: lambda: read_run_tokenizer(epath.Path(info.parent)),
    }
    for path, read in readers.items():
        data, expected, refused = path.read_bytes(), read(), 0
        for bit in range(0, 8 * len(data), 3):
            path.write_bytes(with_flipped_bit(data, bit))
            try:
                assert read() == expected
            except UserError as error:
                assert "\n" not in str(error)
                refused += 1
        assert refused > len(data)


def test_config_record_without_a_hash_is_read(tmp_path):
    record = {"config": {"seed": 0}, "data": "a1", "tokenizer": "b"}
    (tmp_path / "config.json").write_text(json.dumps(record))
    assert read_config_record(tmp_path / "config.json") == record


def test_moved_run_is_readable(run, tmp_path_factory):
    moved = epath.Path(tmp_path_factory.mktemp("moved") / "run")
    shutil.move(run, moved)
    check_rows_of(moved)
    assert_same(restored(moved)[0], state_of(4))
