"""Preparations that go on after a kill, and never mix with others."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from stackjax.data import parts
from stackjax.data import piece as reading
from stackjax.data.config import PrepareConfig
from stackjax.data.prepare import prepare
from stackjax.data.write_part import write_part
from stackjax.runtime.errors import UserError

TEXTS = [f"document {i}: déjà vu\n" * (i % 7 + 1) for i in range(60)]


def write_jsonl(path: Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


@pytest.mark.parametrize("every", [pytest.param(1, marks=pytest.mark.slow), 31])
def test_killed_preparation_goes_on_and_ends_in_the_same_bytes(tmp_path, every):
    write_jsonl(tmp_path / "a.jsonl", TEXTS)
    script = Path(__file__).with_name("kill_prepare.py")
    done = subprocess.run(
        [sys.executable, script, tmp_path, str(every)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.getcwd()},
    )
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("result ")]
    results = [json.loads(line.removeprefix("result ")) for line in lines]
    assert len(results) >= (3 if every > 1 else 60)
    for result in results:
        # A kill after the output's rename leaves a complete output, which is refused again.
        assert (result["again"] == 0) == (not result["was_complete"]), result
        assert result["is_equal"] and result["is_kept"], result
        assert result["left"] == [], result
    assert max(result["kept"] for result in results) > 10


@pytest.fixture
def small_parts(monkeypatch):
    """Makes parts small, in this process only."""
    monkeypatch.setattr(reading, "PIECE_BYTES", 300)
    monkeypatch.setattr(parts, "PART_BYTES", 1000)


@pytest.fixture
def run(tmp_path, monkeypatch, small_parts):
    """Returns a function that prepares a data set, perhaps with a failure after some parts."""

    def call(fail_after: int | None = None, **options) -> list[str]:
        done = []

        def write_or_fail(config, digest, directory, part):
            if len(done) == fail_after:
                raise OSError("the disk is full")
            done.append(part.index)
            return write_part(config, digest, directory, part)

        options = {"tokenizer": "bytes", "validation_fraction": 0.3} | options
        paths = (str(tmp_path / "a.jsonl"), str(tmp_path / "out"))
        with monkeypatch.context() as patch:
            patch.setattr("stackjax.data.prepare.write_part", write_or_fail)
            if fail_after is None:
                prepare(PrepareConfig(paths=paths, num_processes=1, **options))
            else:
                with pytest.raises(OSError, match="disk is full"):
                    prepare(PrepareConfig(paths=paths, num_processes=1, **options))
        return done

    write_jsonl(tmp_path / "a.jsonl", TEXTS)
    return call


def test_failure_keeps_finished_parts(tmp_path, run, capsys):
    assert len(run(fail_after=3)) == 3
    printed = capsys.readouterr().out
    assert f"kept: 3 finished parts in {tmp_path / '.out.unfinished'}; the same" in printed
    assert not set(run()) & {0, 1, 2}
    printed = capsys.readouterr().out
    assert "going on: 3 of" in printed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "out"]


CHANGES = {
    "options": dict(validation_fraction=0.1),
    "inputs": None,
    "tokenizer": dict(tokenizer="tokenizer.json", end_token="<done>"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_parts_of_another_preparation_are_removed(tmp_path, monkeypatch, run, capsys, what):
    monkeypatch.chdir(tmp_path)
    tokens = {"?": 0, "<done>": 1, "document": 2}
    fields = {
        "model": {"type": "WordLevel", "vocab": tokens, "unk_token": "?"},
        "pre_tokenizer": {"type": "WhitespaceSplit"},
    }
    Path("tokenizer.json").write_text(json.dumps(fields))
    run(fail_after=3)
    capsys.readouterr()
    if what == "inputs":
        write_jsonl(tmp_path / "a.jsonl", TEXTS[::-1])
    assert run(**(CHANGES[what] or {}))[:3] == [0, 1, 2]
    printed = capsys.readouterr().out
    assert "starting anew" in printed and f"other {what}\n" in printed


def damage(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2])


@pytest.mark.parametrize(
    "name", ["part00001.json", "part00001.train", "part00001.train.hashes"]
)
def test_damaged_part_is_written_again(tmp_path, run, name):
    run()
    expected = contents(tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / "expected")
    run(fail_after=3)
    damage(tmp_path / ".out.unfinished" / "parts" / name)
    assert set(run()) & {0, 1, 2} == {1}
    assert contents(tmp_path / "out") == expected


def test_finished_parts_serve_another_treatment_of_bad_rows(tmp_path, run):
    rows = [json.dumps({"text": text}) for text in TEXTS]
    bad = [*rows[:10], "{", *rows[10:40], '{"text": null}', *rows[40:]]
    (tmp_path / "a.jsonl").write_text("\n".join(bad) + "\n")
    with pytest.raises(UserError, match=r"line 11: not JSON.*--on-invalid skip leaves"):
        run()
    with pytest.raises(UserError, match=r"line 42: .*null; --on-missing skip leaves"):
        run(on_invalid="skip")
    done = run(on_missing="skip", on_invalid="skip")
    assert 0 not in done and len(done) > 1
    (tmp_path / "out").rename(tmp_path / "once")
    run(on_missing="skip", on_invalid="skip")
    assert contents(tmp_path / "out") == contents(tmp_path / "once")


def test_skipped_rows_are_not_kept_where_rows_are_refused(tmp_path, run):
    rows = [json.dumps({"text": text}) for text in TEXTS]
    (tmp_path / "a.jsonl").write_text("\n".join([*rows[:3], "{", *rows[3:]]) + "\n")
    run(fail_after=3, on_invalid="skip")
    with pytest.raises(UserError, match="line 4: not JSON"):
        run()
