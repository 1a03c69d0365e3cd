"""What `prepare` writes is a function of its inputs, and is complete or absent."""

import dataclasses
import gzip
import itertools
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tensorflow_datasets as tfds
import tokenizers
import zstandard

from stackjax import prepare as command
from stackjax.data import documents as reading
from stackjax.data.sources import MANIFEST, TokenSource, read_manifest
from stackjax.data.tokenizer import load_tokenizer
from stackjax.prepare import PrepareConfig, choose_split, prepare

TEXTS = [f"document {i}: déjà vu\n" * (i % 7 + 1) for i in range(200)]
COMMAND = [sys.executable, "-m", "stackjax.prepare"]


def json_lines(texts: list[str], field: str = "text") -> bytes:
    rows = (json.dumps({"id": 1, field: text}) + "\n" for text in texts)
    return "".join(rows).encode()


def write_jsonl(path: Path, texts: list[str]) -> str:
    path.write_bytes(json_lines(texts))
    return str(path)


def write_gzip(path: Path, texts: list[str]) -> str:
    """Writes two members, as concatenated files have."""
    half = len(texts) // 2
    members = (gzip.compress(json_lines(part)) for part in (texts[:half], texts[half:]))
    path.write_bytes(b"".join(members))
    return str(path)


def write_zstd(path: Path, texts: list[str]) -> str:
    half = len(texts) // 2
    frames = (zstandard.compress(json_lines(part)) for part in (texts[:half], texts[half:]))
    path.write_bytes(b"".join(frames))
    return str(path)


def write_parquet(path: Path, texts: list[str]) -> str:
    table = pyarrow.table({"id": range(len(texts)), "text": texts})
    pyarrow.parquet.write_table(table, path, row_group_size=30)
    return str(path)


def write_texts(path: Path, texts: list[str]) -> str:
    path.mkdir()
    for index, text in enumerate(texts):
        (path / f"{index:05d}").write_bytes(text.encode())
    return str(path / "**")


INPUTS: dict[str, Callable[[Path, list[str]], str]] = {
    "a.jsonl": write_jsonl,
    "a.jsonl.gz": write_gzip,
    "a.jsonl.zst": write_zstd,
    "a.parquet": write_parquet,
    "texts": write_texts,
}


@pytest.fixture(autouse=True)
def quiet(capsys):
    """Keeps what the command prints out of the report."""


@pytest.fixture
def small_parts(monkeypatch):
    """Cuts inputs as finely as terabytes are cut (in this process only)."""
    monkeypatch.setattr(reading, "PIECE_BYTES", 300)
    monkeypatch.setattr(command, "PART_BYTES", 1000)


def run(*paths, tokenizer: str = "bytes", **options) -> Path:
    """Prepares and returns the directory."""
    options = {"validation_fraction": 0.1, "num_processes": 1} | options
    paths = tuple(map(str, paths))
    prepare(PrepareConfig(paths=paths, tokenizer=tokenizer, **options))
    assert not [path for path in Path(paths[-1]).parent.iterdir() if is_hidden(path)]
    return Path(paths[-1])


def is_hidden(path: Path) -> bool:
    return path.name.startswith(".")


def read_back(path: Path, split: str, tokenizer: str = "bytes", **options) -> list[str]:
    """Returns the documents of a split, decoded."""
    manifest = read_manifest(str(path))
    stream = TokenSource(str(path), split, manifest.splits[split].tokens)[0]
    end = manifest.tokenizer.end_id
    ends = np.flatnonzero(stream == end)
    assert len(ends) == manifest.splits[split].documents
    parts = np.split(stream, ends + 1)[:-1]
    decode = load_tokenizer(tokenizer, **options).decode
    return [decode(part[:-1]) for part in parts]


def contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


@pytest.mark.parametrize("name", INPUTS)
def test_every_format_decodes_to_its_documents(tmp_path, small_parts, name):
    output = run(INPUTS[name](tmp_path / name, TEXTS), tmp_path / "out")
    for split in ("train", "validation"):
        expected = [text for text in TEXTS if choose_split(text, 0.1) == split]
        assert expected
        assert read_back(output, split) == expected


def test_inputs_follow_each_other(tmp_path):
    first = write_jsonl(tmp_path / "b.jsonl", TEXTS[:9])
    second = write_parquet(tmp_path / "a.parquet", TEXTS[9:20])
    output = run(first, second, tmp_path / "out", validation_fraction=0)
    assert read_back(output, "train") == TEXTS[:20]


def test_the_manifest_counts_what_is_there(tmp_path, small_parts):
    output = run(write_jsonl(tmp_path / "a.jsonl", TEXTS), tmp_path / "out")
    manifest = read_manifest(str(output))
    files = {MANIFEST}
    for name, split in manifest.splits.items():
        assert len(split.shards) > 3
        assert split.tokens == sum(shard.tokens for shard in split.shards)
        for index, shard in enumerate(split.shards):
            expected = f"{name}-{index:05d}-of-{len(split.shards):05d}.array_record"
            assert shard.file == expected
            assert shard.bytes == (output / shard.file).stat().st_size
            files.add(shard.file)
    assert files == {file.name for file in output.iterdir()}
    total = sum(split.documents for split in manifest.splits.values())
    assert total == len(TEXTS)
    assert manifest.dtype == "uint16"


def test_the_cut_of_an_input_does_not_change_the_stream(tmp_path, monkeypatch):
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    streams = []
    for size in (1, 7, 100, 10**9):
        monkeypatch.setattr(reading, "PIECE_BYTES", size)
        monkeypatch.setattr(command, "PART_BYTES", size * 50)
        output = run(path, tmp_path / f"out{size}")
        streams.append(read_back(output, "train"))
    assert all(stream == streams[0] for stream in streams)


def test_the_number_of_processes_does_not_change_a_byte(tmp_path):
    """Pieces of the real size, so that processes that are spawned cut alike."""
    files = [
        write_jsonl(tmp_path / "a.jsonl", [text * 2000 for text in TEXTS]),
        write_parquet(tmp_path / "b.parquet", [text * 999 for text in TEXTS]),
    ]
    written = [
        contents(run(*files, tmp_path / f"out{count}", num_processes=count)) for count in (1, 3)
    ]
    assert written[0] == written[1]
    shards = [name for name in written[0] if name.startswith("train")]
    assert len(shards) >= 2


class Tiny(tfds.core.GeneratorBasedBuilder):
    """Texts with, or without, a validation split of their own."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [
        tfds.core.BuilderConfig(name=name, version="1.0.0") for name in ("split", "whole")
    ]

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(
                {"text": tfds.features.Text(), "label": np.int64}
            ),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager):
        splits = {"train": self._generate_examples(TEXTS[:50])}
        if self.builder_config.name == "split":
            splits["validation"] = self._generate_examples(TEXTS[50:60])
        return splits

    def _generate_examples(self, texts):
        for index, text in enumerate(texts):
            yield index, {"text": text, "label": index}


@pytest.fixture
def tfds_home(tmp_path_factory, monkeypatch) -> Path:
    """Where TFDS looks for datasets while a test runs; empty."""
    path = tmp_path_factory.mktemp("tfds")
    monkeypatch.setattr(tfds.core.constants, "DATA_DIR", str(path))
    return path


@pytest.fixture
def tiny(tfds_home) -> Callable[[str], str]:
    """Builds a dataset where TFDS looks for it, and returns its input name."""
    tfds.disable_progress_bar()

    def build(name: str) -> str:
        builder = tfds.builder(f"tiny/{name}", data_dir=tfds_home, file_format="array_record")
        builder.download_and_prepare()
        return f"tfds:tiny/{name}"

    return build


def test_a_tfds_dataset_keeps_its_validation_split(tmp_path, small_parts, tiny):
    output = run(tiny("split"), tmp_path / "out")
    assert read_back(output, "train") == TEXTS[:50]
    assert read_back(output, "validation") == TEXTS[50:60]


def test_a_tfds_dataset_without_one_is_split_by_content(tmp_path, tiny):
    output = run(tiny("whole"), tmp_path / "out")
    for split in ("train", "validation"):
        expected = [text for text in TEXTS[:50] if choose_split(text, 0.1) == split]
        assert read_back(output, split) == expected


def test_the_built_in_corpus_is_an_input(tmp_path, monkeypatch):
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
def test_tokens_are_stored_in_the_smallest_type_that_holds_them(tmp_path, top, dtype):
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


def test_the_split_is_a_function_of_the_text():
    held_out = [choose_split(str(i), 0.1) == "validation" for i in range(5000)]
    assert 400 < sum(held_out) < 600
    assert held_out == [choose_split(str(i), 0.1) == "validation" for i in range(5000)]
    more = [choose_split(str(i), 0.2) == "validation" for i in range(5000)]
    assert all(b for a, b in zip(held_out, more, strict=True) if a)


def test_documents_without_tokens_are_left_out(tmp_path):
    text = write_jsonl(tmp_path / "a.jsonl", ["", "a", "\0", "b\0c", "\ud800"])
    output = run(text, tmp_path / "out", validation_fraction=0)
    assert read_back(output, "train") == ["a", "bc", "?"]


def test_blank_lines_a_byte_order_mark_and_crlf_are_taken(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\n  \n{"text": "b"}')
    output = run(path, tmp_path / "out", validation_fraction=0)
    assert read_back(output, "train") == ["a", "b"]


def fail(capsys, *arguments) -> str:
    """Runs the command in this process and returns its one line of error."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(sys, "argv", ["prepare", *map(str, arguments)])
        command.main()
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    return error


BAD_FILES = {
    "bad.jsonl": (b'{"text": "a"}\n\n{"text": "b"\n', "line 3: not JSON"),
    "list.jsonl": (b"[1]\n", "line 1: no field 'text'"),
    "field.jsonl": (b'{"text": "a"}\n{"words": "b"}\n', "line 2: no field 'text'"),
    "number.jsonl": (b'{"text": 1}\n', "line 1: the field 'text' is not a text"),
    "null.jsonl": (b'{"text": null}\n', "line 1: the field 'text' is not a text"),
    "latin.jsonl": (b'{"text": "\xe9"}\n', "line 1: 'utf-8' codec"),
    "cut.jsonl.gz": (gzip.compress(json_lines(TEXTS))[:-9], "cannot be read: Trunc"),
    "cut.jsonl.zst": (zstandard.compress(json_lines(TEXTS))[:-9], "cannot be read"),
    "junk.jsonl.gz": (b"junk" * 30, "cannot be read"),
    "junk.parquet": (b"junk" * 30, "is not a Parquet file"),
    "latin.txt": (b"caf\xe9", "is not UTF-8 text"),
    "empty.txt": (b"", "no text"),
    "empty.jsonl": (b"", "no text"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_one_line_of_error_and_leaves_nothing(tmp_path, capsys, name):
    content, says = BAD_FILES[name]
    path = tmp_path / name
    path.write_bytes(content)
    error = fail(capsys, path, tmp_path / "out", "--tokenizer", "bytes")
    assert says in error
    assert name in error or "no text" in error
    assert list(tmp_path.iterdir()) == [path]


def test_a_bad_line_far_into_a_file_has_its_number(tmp_path, capsys, small_parts):
    path = tmp_path / "a.jsonl"
    path.write_bytes(json_lines(TEXTS) + b"{\n")
    error = fail(capsys, path, tmp_path / "out", "--tokenizer", "bytes")
    assert f"line {len(TEXTS) + 1}: not JSON" in error


def test_a_missing_column_is_named(tmp_path, capsys):
    path = write_parquet(tmp_path / "a.parquet", TEXTS)
    arguments = (path, tmp_path / "out", "--tokenizer", "bytes", "--text-field")
    assert "no field 'words' (there are: 'id', 'text')" in fail(capsys, *arguments, "words")
    assert "'id' is not a text" in fail(capsys, *arguments, "id")


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("absent.jsonl", "matches no file"),
        ("*.nix", "matches no file"),
        ("", "is a directory"),
        ("tfds:no_such_dataset", "cannot be read: Dataset no_such_dataset not found"),
        ("tfds:tiny/no_such_config", "cannot be read"),
        ("tfds:tiny:9.9.9", "cannot be read"),
        ("tfds:tiny/whole", "file_format='array_record'"),
        ("tfds:", "cannot be read"),
    ],
)
def test_an_absent_input_is_named(tmp_path, capsys, tfds_home, source, says):
    name = source if source.startswith("tfds:") else f"{tmp_path}/{source}"
    error = fail(capsys, name, tmp_path / "out", "--tokenizer", "bytes")
    assert says in error and source in error
    assert list(tmp_path.iterdir()) == []


def test_an_absent_tokenizer_is_named(tmp_path, capsys):
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    error = fail(capsys, path, tmp_path / "out", "--tokenizer", "absent.json")
    assert "tokenizer 'absent.json' is not a file" in error


@pytest.mark.parametrize(
    "change",
    [{"paths": ("a",)}, {"num_processes": 0}, {"validation_fraction": 1.0}],
)
def test_impossible_options_are_refused(change):
    options = {"paths": ("a", "b"), "tokenizer": "bytes"} | change
    with pytest.raises(ValueError, match=str(next(iter(change)))):
        PrepareConfig(**options)


def test_what_exists_is_never_overwritten(tmp_path, capsys):
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    output = run(path, tmp_path / "out")
    before = contents(output)
    assert "exists already" in fail(capsys, path, output, "--tokenizer", "bytes")
    assert "exists already" in fail(capsys, path, path, "--tokenizer", "bytes")
    assert contents(output) == before


def test_the_command_prints_plain_lines_where_there_is_no_terminal(tmp_path):
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


def test_a_full_disk_is_one_line_of_error_and_leaves_nothing(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [text * 200 for text in TEXTS])
    done = subprocess.run(
        [*COMMAND, path, tmp_path / "out", "--tokenizer", "bytes"],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (200_000,) * 2),
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: cannot write")
    assert done.stderr.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == [Path(path)]


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> str:
    """A file that keeps two processes busy for a while."""
    path = tmp_path_factory.mktemp("large") / "a.jsonl"
    text = "".join(TEXTS)
    rows = json_lines([f"{index} {text}" for index in range(200)])
    path.write_bytes(rows * 20)
    return str(path)


def start(large: str, output: Path) -> subprocess.Popen:
    """Starts the command on two processes; returns once both are writing shards."""
    process = subprocess.Popen(
        [*COMMAND, large, output, "--tokenizer", "bytes", "--num-processes", "2"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    wait_for(lambda: len(list(output.parent.glob(".*/part*.train"))) >= 2)
    return process


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def group_is_gone(process: subprocess.Popen) -> bool:
    try:
        os.killpg(process.pid, 0)
    except ProcessLookupError:
        return True
    return False


def test_killed_and_run_again_it_is_complete(large, tmp_path):
    output = tmp_path / "out"
    process = start(large, output)
    process.kill()
    process.communicate()
    wait_for(lambda: group_is_gone(process))
    assert not output.exists()
    left = [path.name for path in tmp_path.iterdir()]
    assert len(left) == 1 and left[0].startswith(".out")
    run(large, output)
    manifest = read_manifest(str(output))
    documents = sum(split.documents for split in manifest.splits.values())
    assert documents == 4000
    assert len(TokenSource(str(output), "train", 2048)) > 1000


def worker_ids(process: subprocess.Popen) -> list[int]:
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    found = []
    for child in map(int, children.split()):
        with open(f"/proc/{child}/cmdline") as file:
            if "spawn_main" in file.read():
                found.append(child)
    return found


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="reads /proc")
def test_a_killed_worker_ends_the_command_with_a_message(large, tmp_path):
    process = start(large, tmp_path / "out")
    os.kill(worker_ids(process)[0], signal.SIGKILL)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 2
    assert error.startswith("error: a worker process was killed")
    assert error.count("\n") == 1
    wait_for(lambda: group_is_gone(process))
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_command_leaves_nothing(large, tmp_path):
    process = start(large, tmp_path / "out")
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert error == "error: interrupted; nothing was written.\n"
    assert process.returncode == 130
    wait_for(lambda: group_is_gone(process))
    assert list(tmp_path.iterdir()) == []


def test_two_commands_at_once_write_one_set(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    arguments = [*COMMAND, path, tmp_path / "out", "--tokenizer", "bytes"]
    both = [subprocess.Popen(arguments, stderr=subprocess.PIPE) for _ in range(2)]
    errors = [process.communicate(timeout=60)[1] for process in both]
    assert sorted(process.returncode for process in both) == [0, 2]
    assert any(b"exists already" in error for error in errors)
    assert read_manifest(str(tmp_path / "out")).splits["train"].documents > 100
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl", "out"]
