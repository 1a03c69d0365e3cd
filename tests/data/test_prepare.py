"""`prepare`: shards, manifest, splits, digests and errors."""

import collections
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from stackjax import prepare as command
from stackjax.data import parts
from stackjax.data import piece as reading
from stackjax.data.config import PrepareConfig
from stackjax.data.document import choose_split
from stackjax.data.manifest import MANIFEST, read_manifest
from stackjax.data.prepare import prepare
from stackjax.data.sources import TokenSource
from stackjax.tokenizer.tokenizer import load_tokenizer

TEXTS = [f"document {i}: déjà vu\n" * (i % 7 + 1) for i in range(200)]
COMMAND = [sys.executable, "-m", "stackjax.prepare"]


def json_lines(texts: list[str], field: str = "text") -> bytes:
    rows = (json.dumps({"id": 1, field: text}) + "\n" for text in texts)
    return "".join(rows).encode()


def write_jsonl(path: Path, texts: list[str]) -> str:
    path.write_bytes(json_lines(texts))
    return str(path)


@pytest.fixture(autouse=True)
def quiet(capsys):
    """Hides the command's output from the test report."""


@pytest.fixture
def small_pieces(monkeypatch):
    """Makes pieces and parts small, in this process only."""
    monkeypatch.setattr(reading, "PIECE_BYTES", 300)
    monkeypatch.setattr(parts, "PART_BYTES", 1000)


def run(*paths, tokenizer: str = "bytes", **options) -> Path:
    """Prepares a data set and returns the directory."""
    options = {"validation_fraction": 0.1, "num_processes": 1} | options
    paths = tuple(map(str, paths))
    prepare(PrepareConfig(paths=paths, tokenizer=tokenizer, **options))
    assert not [path for path in Path(paths[-1]).parent.iterdir() if is_hidden(path)]
    return Path(paths[-1])


def is_hidden(path: Path) -> bool:
    return path.name.startswith(".")


def read_back(path: Path, split: str, tokenizer: str = "bytes", **options) -> list[str]:
    """Returns the decoded documents of a split."""
    manifest = read_manifest(str(path))
    stream = TokenSource(str(path), split, manifest.splits[split].tokens)[0]
    end = manifest.tokenizer.end_id
    ends = np.flatnonzero(stream == end)
    assert len(ends) == manifest.splits[split].documents
    parts = np.split(stream, ends + 1)[:-1]
    assert (path / (manifest.tokenizer.file or MANIFEST)).is_file()
    decode = load_tokenizer(tokenizer, **options).decode
    return [decode(part[:-1]) for part in parts]


def contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


def test_manifest_counts_match_the_shards(tmp_path, small_pieces):
    output = run(write_jsonl(tmp_path / "a.jsonl", TEXTS), tmp_path / "out")
    manifest = read_manifest(str(output))
    files = {MANIFEST, "train.hashes", "validation.hashes", "inputs.jsonl"}
    for name, split in manifest.splits.items():
        assert len(split.shards) > 3
        assert split.tokens == sum(shard.tokens for shard in split.shards)
        for index, shard in enumerate(split.shards):
            expected = f"{name}-{index:05d}-of-{len(split.shards):05d}.array_record"
            assert shard.file == expected
            assert shard.bytes == (output / shard.file).stat().st_size
            assert shard.lengths.file == f"{expected}.lengths"
            files.update(shard.files)
    assert files == {file.name for file in output.iterdir()}
    total = sum(split.documents for split in manifest.splits.values())
    assert total == len(TEXTS)
    assert manifest.dtype == "uint16"


def test_piece_size_does_not_change_the_stream(tmp_path, monkeypatch):
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    streams = []
    for size in (1, 7, 100, 10**9):
        monkeypatch.setattr(reading, "PIECE_BYTES", size)
        monkeypatch.setattr(parts, "PART_BYTES", size * 50)
        output = run(path, tmp_path / f"out{size}")
        streams.append(read_back(output, "train"))
    assert all(stream == streams[0] for stream in streams)


def test_num_processes_does_not_change_a_byte(tmp_path):
    # Spawned processes have the default piece size.
    files = [
        write_jsonl(tmp_path / "a.jsonl", [text * 1000 for text in TEXTS]),
        write_jsonl(tmp_path / "b.jsonl", [text * 500 for text in TEXTS]),
    ]
    written = [
        contents(run(*files, tmp_path / f"out{count}", num_processes=count)) for count in (1, 2)
    ]
    assert written[0] == written[1]
    shards = [name for name in written[0] if name.startswith("train")]
    assert len(shards) >= 2


SAME_LENGTHS = [text.replace("vu", "VU") for text in TEXTS]


@pytest.mark.parametrize("texts", [SAME_LENGTHS, TEXTS[::-1], TEXTS[1:] + TEXTS[:1]])
def test_changed_or_reordered_text_changes_the_digest(tmp_path, texts):
    options = dict(validation_fraction=0)
    one = run(write_jsonl(tmp_path / "a.jsonl", TEXTS), tmp_path / "one", **options)
    two = run(write_jsonl(tmp_path / "b.jsonl", texts), tmp_path / "two", **options)
    manifests = [read_manifest(str(path)) for path in (one, two)]
    assert manifests[0].splits["train"].tokens == manifests[1].splits["train"].tokens
    assert manifests[0].digest != manifests[1].digest


def test_same_texts_from_another_file_have_the_same_digest(tmp_path, small_pieces):
    paths = [write_jsonl(tmp_path / name, TEXTS) for name in ("a.jsonl", "b.ndjson")]
    one, two = (run(path, Path(path).with_suffix(".out")) for path in paths)
    assert read_manifest(str(one)).digest == read_manifest(str(two)).digest


def test_documents_are_split_by_their_text(tmp_path, small_pieces):
    output = run(write_jsonl(tmp_path / "a.jsonl", TEXTS), tmp_path / "out")
    for split in ("train", "validation"):
        expected = [text for text in TEXTS if choose_split(text, 0.1) == split]
        assert expected
        assert read_back(output, split) == expected


def test_builtin_corpus_can_be_prepared(tmp_path, monkeypatch):
    for index in range(100):
        (tmp_path / f"m{index:02d}.py").write_text(f"x = {index}\n")
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    output = run("tfds:stackjax_stdlib", tmp_path / "deep" / "out")
    both = [*read_back(output, "train"), *read_back(output, "validation")]
    assert sorted(both) == sorted(f"x = {index}\n" for index in range(100))


def write_tokenizer(path: Path, ids: dict[str, int]) -> str:
    model = tokenizers.models.WordLevel(ids, unk_token="?")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(path))
    return str(path)


@pytest.mark.parametrize(("top", "dtype"), [(65_535, "uint16"), (65_536, "uint32")])
def test_tokens_have_the_smallest_dtype(tmp_path, top, dtype):
    name = write_tokenizer(tmp_path / "t.json", {"?": 0, "a": top, "<done>": 7})
    text = write_jsonl(tmp_path / "a.jsonl", ["a b a"])
    options = dict(validation_fraction=0, end_token="<done>")
    output = run(text, tmp_path / "out", tokenizer=name, **options)
    manifest = read_manifest(str(output))
    assert manifest.dtype == dtype
    assert manifest.tokenizer.vocab_size == top + 1
    assert manifest.tokenizer.digest == load_tokenizer(name, "<done>").digest
    tokens = TokenSource(str(output), "train", 4)[0]
    assert tokens.tolist() == [top, 0, top, 7]


def test_split_is_a_function_of_the_text():
    held_out = [choose_split(str(i), 0.1) == "validation" for i in range(5000)]
    assert 400 < sum(held_out) < 600
    assert held_out == [choose_split(str(i), 0.1) == "validation" for i in range(5000)]
    more = [choose_split(str(i), 0.2) == "validation" for i in range(5000)]
    assert all(b for a, b in zip(held_out, more, strict=True) if a)


def test_documents_without_tokens_are_skipped(tmp_path):
    text = write_jsonl(tmp_path / "a.jsonl", ["", "a", "\0", "b\0c", "\ud800"])
    output = run(text, tmp_path / "out", validation_fraction=0)
    assert read_back(output, "train") == ["a", "bc", "?"]


def test_skipped_rows_are_counted(tmp_path, capsys, small_pieces):
    texts = [*TEXTS, None, "", None, *TEXTS, "", None]
    run(write_jsonl(tmp_path / "a.jsonl", texts), tmp_path / "out", on_missing="skip")
    printed = capsys.readouterr().out
    assert "left out: 3 (null text)\n" in printed
    assert "left out: 2 (no tokens)\n" in printed


@pytest.fixture
def error_of(run_main):
    """Runs the command with an error; returns the error line."""

    def run(*args) -> str:
        code, _, error = run_main(command.main, *args)
        assert (code, error.count("\n")) == (2, 1)
        assert error.startswith("error: ")
        return error

    return run


@pytest.mark.parametrize("content", [b'{"text": "a"}\n{\n', b"", b'{"text": ""}\n'])
def test_user_error_is_one_line_and_leaves_no_output(tmp_path, error_of, content):
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    error = error_of(path, tmp_path / "out", "--tokenizer", "bytes")
    assert ("line 2: not JSON" if len(content) > 14 else "have no text") in error
    assert list(tmp_path.iterdir()) == [path]


def test_user_error_in_a_worker_is_one_line(tmp_path, error_of):
    path = tmp_path / "a.jsonl"
    # Three pieces, in two parts.
    path.write_bytes(json_lines([text * 1500 for text in TEXTS]) + b"{\n")
    options = ("--tokenizer", "bytes", "--num-processes", "2")
    error = error_of(path, tmp_path / "out", *options)
    assert f"line {len(TEXTS) + 1}: not JSON" in error
    # A part that another worker had finished is kept for the next try.
    assert {each.name for each in tmp_path.iterdir()} <= {path.name, ".out.unfinished"}


def test_lack_of_memory_is_one_line(tmp_path, error_of, monkeypatch):
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)

    def too_large(*_):
        raise MemoryError

    monkeypatch.setattr("stackjax.data.write_part.write_shards", too_large)
    options = ("--tokenizer", "bytes", "--num-processes", "1")
    error = error_of(path, tmp_path / "out", *options)
    assert f"too little memory to read {path!r}" in error
    assert list(tmp_path.iterdir()) == [Path(path)]


def test_small_disk_prints_a_warning(tmp_path, capsys, monkeypatch, small_pieces):
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(9, 8, 1))
    run(write_jsonl(tmp_path / "a.jsonl", TEXTS), tmp_path / "out")
    warning = capsys.readouterr().err
    assert warning.startswith("warning: about 0.0 GB are still to be written, but the disk of")
    assert warning.count("\n") == 1


def test_existing_file_as_output_is_refused_and_kept(tmp_path, error_of):
    paths = [write_jsonl(tmp_path / name, TEXTS) for name in ("a.jsonl", "b.jsonl")]
    error = error_of(*paths, "--tokenizer", "bytes")
    assert f"the last path, {paths[1]!r}, is the OUTPUT" in error
    assert Path(paths[1]).read_bytes() == json_lines(TEXTS)


def test_home_and_temporary_directory_are_optional(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    environment = os.environ | {"HOME": "/nonexistent", "TMPDIR": "/nonexistent"}
    arguments = [*COMMAND, path, tmp_path / "out", "--tokenizer", "bytes"]
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_missing_tokenizer_is_named(tmp_path, error_of):
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    error = error_of(path, tmp_path / "out", "--tokenizer", "absent.json")
    assert "tokenizer 'absent.json' is not a file" in error


@pytest.mark.parametrize(
    "change",
    [{"paths": ("a",)}, {"num_processes": 0}, {"validation_fraction": 1.0}],
)
def test_invalid_options_are_refused(change):
    options = {"paths": ("a", "b"), "tokenizer": "bytes"} | change
    with pytest.raises(ValueError, match=str(next(iter(change)))):
        PrepareConfig(**options)


def test_existing_output_is_never_overwritten(tmp_path, error_of):
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    output = run(path, tmp_path / "out")
    before = contents(output)
    assert "exists already" in error_of(path, output, "--tokenizer", "bytes")
    assert "exists already" in error_of(path, path, "--tokenizer", "bytes")
    assert contents(output) == before


def test_progress_is_plain_lines_without_a_terminal(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    done = subprocess.run(
        [*COMMAND, path, tmp_path / "out", "--tokenizer", "bytes"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""
    assert "\x1b" not in done.stdout
    assert done.stdout.splitlines()[-1].startswith("validation: ")
