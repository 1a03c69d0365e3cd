"""Counts of a data set: documents by input file, duplicates, and overlap with other sets."""

import gzip
import hashlib
import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from stackjax import prepare as command
from stackjax.data import hashes, parts
from stackjax.data import piece as reading
from stackjax.data.config import PrepareConfig
from stackjax.data.counts import InputCounts, read_inputs
from stackjax.data.hashes import count_shared, merge_hashes, write_hashes
from stackjax.data.manifest import read_manifest
from stackjax.data.overlap import Overlap, overlap
from stackjax.data.prepare import prepare
from stackjax.runtime.errors import UserError

TEXTS = [f"document {i}: déjà vu" for i in range(300)]


@pytest.fixture(autouse=True)
def quiet(capsys):
    """Hides the command's output from the test report."""


def lines(texts: list[str]) -> bytes:
    return b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts)


def make(directory: Path, texts: list[str], **options) -> str:
    """Prepares texts and returns the directory."""
    file = directory.with_suffix(".jsonl")
    file.write_bytes(lines(texts))
    options = {"validation_fraction": 0.2, "tokenizer": "bytes", "num_processes": 1} | options
    prepare(PrepareConfig(paths=(str(file), str(directory)), **options))
    return str(directory)


def hash_of(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def split_hashes(texts: list[str], fraction: float = 0.2) -> tuple[list[int], list[int]]:
    """Returns the hashes of the training and the validation documents, with repeats."""
    found = [hash_of(text) for text in texts]
    bound = fraction * 2**64
    return [each for each in found if each >= bound], [each for each in found if each < bound]


@pytest.mark.parametrize("part_bytes", [1000, 2**24])
def test_hashes_and_duplicates_are_those_of_the_texts(tmp_path, monkeypatch, part_bytes):
    monkeypatch.setattr(reading, "PIECE_BYTES", part_bytes)
    monkeypatch.setattr(parts, "PART_BYTES", part_bytes)
    texts = [*TEXTS, *TEXTS[:40], *TEXTS[10:30]]
    manifest = read_manifest(make(tmp_path / "set", texts))
    assert manifest.validation_fraction == 0.2
    for name, expected in zip(("train", "validation"), split_hashes(texts), strict=True):
        split = manifest.splits[name]
        data = (tmp_path / "set" / split.hashes.file).read_bytes()
        assert np.frombuffer(data, "<u8").tolist() == sorted(set(expected))
        assert split.duplicates == len(expected) - len(set(expected)) > 0
        assert split.hashes.bytes == len(data)
        assert split.hashes.sha256 == hashlib.sha256(data).hexdigest()
    assert manifest.shared_documents == 0


def test_counts_do_not_change_the_digest(tmp_path):
    one = read_manifest(make(tmp_path / "one", TEXTS))
    two = read_manifest(make(tmp_path / "two", [*TEXTS, ""]))
    assert one.digest == two.digest
    assert one != two


def test_documents_are_counted_by_input_file(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "PIECE_BYTES", 300)
    monkeypatch.setattr(parts, "PART_BYTES", 700)
    (tmp_path / "a.jsonl").write_bytes(lines([*TEXTS[:50], "", *TEXTS[50:60]]))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines(["é"])))
    (tmp_path / "c.jsonl").write_bytes(b"")
    (tmp_path / "d.txt").write_bytes(b"")
    output = str(tmp_path / "set")
    names = [str(tmp_path / name) for name in ("a.jsonl", "b.jsonl.gz", "c.jsonl", "d.txt")]
    prepare(PrepareConfig(paths=(*names, output), tokenizer="bytes", num_processes=1))
    size = sum(len(text.encode()) for text in TEXTS[:60])
    a, b, d = names[0], names[1], names[3]
    none = {"no tokens": 1}
    assert list(read_inputs(output)) == [
        InputCounts(source=a, documents=60, bytes=size, left_out=none),
        InputCounts(source=b, documents=1, bytes=2, left_out={}),
        InputCounts(source=d, documents=0, bytes=0, left_out=none),
    ]
    assert read_manifest(output).left_out == {"no tokens": 2}


def test_overlap_is_that_of_the_texts(tmp_path):
    ours, theirs = TEXTS[:200], TEXTS[150:]
    first = make(tmp_path / "first", ours)
    second = make(tmp_path / "second", theirs, validation_fraction=0.6)
    train, validation = map(set, split_hashes(ours))
    their_train, their_validation = map(set, split_hashes(theirs, 0.6))
    assert overlap(first, second) == Overlap(
        train=len(train & their_train),
        validation_in_train=len(validation & their_train),
        train_in_validation=len(train & their_validation),
        validation=len(validation & their_validation),
    )
    assert len(train & their_train) > 5 and len(train & their_validation) > 5
    assert overlap(first, first).train == len(train)


def test_shared_documents_are_printed(tmp_path, run_main):
    other = make(tmp_path / "other", TEXTS[:100])
    (tmp_path / "a.jsonl").write_bytes(lines(TEXTS[50:]))
    arguments = [tmp_path / "a.jsonl", tmp_path / "out", "--tokenizer", "bytes"]
    options = ["--compare-with", other, "--validation-fraction", "0.5"]
    code, printed, _ = run_main(command.main, *arguments, *options)
    assert code == 0
    train, validation = map(set, split_hashes(TEXTS[50:], 0.5))
    their_train, their_validation = map(set, split_hashes(TEXTS[:100]))
    assert (
        f"shared with {other}: {len(train & their_train)} documents in both training splits; "
        f"{len(validation & their_train)} validation documents are in its training split; "
        f"{len(train & their_validation)} training documents are in its validation split\n"
    ) in printed


def test_missing_set_to_compare_with_is_found_before_writing(tmp_path):
    with pytest.raises(UserError, match=r"'absent' has no manifest"):
        make(tmp_path / "set", TEXTS, compare_with=("absent",))
    assert [path.name for path in tmp_path.iterdir()] == ["set.jsonl"]


def test_merge_equals_a_union_at_every_block_size(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    runs = [rng.integers(0, 2**64, size, np.uint64) for size in (0, 1, 300, 1000)]
    runs += [runs[-1][::2], np.array([0, 2**64 - 1], np.uint64)]
    paths = [tmp_path / str(index) for index in range(len(runs))]
    for path, run in zip(paths, runs, strict=True):
        assert write_hashes(path, run.tolist()) == len(set(run.tolist()))
    expected = np.unique(np.concatenate(runs))
    for block in (1, 7, 100, 10**6):
        monkeypatch.setattr(hashes, "BLOCK", block)
        assert merge_hashes(paths, tmp_path / "merged") == len(expected)
        assert (tmp_path / "merged").read_bytes() == expected.astype("<u8").tobytes()
        assert count_shared(paths[3], paths[4]) == 500
        assert count_shared(paths[0], paths[3]) == 0
        assert count_shared(tmp_path / "merged", paths[5]) == 2


def test_merge_and_overlap_take_little_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(hashes, "BLOCK", 2**14)
    rng = np.random.default_rng(0)
    runs = [np.sort(rng.integers(0, 2**64, 250_000, np.uint64)) for _ in range(2)]
    for index, run in enumerate(runs):
        run.tofile(tmp_path / str(index))
    del runs
    tracemalloc.start()
    count = merge_hashes([tmp_path / "0", tmp_path / "1"], tmp_path / "both")
    assert count_shared(tmp_path / "both", tmp_path / "0") == 250_000
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == 500_000  # The chance of a repeat is below 1e-6.
    # Of 8 MB in files, a few blocks of 128 KiB.
    assert peak < 6 * 8 * hashes.BLOCK
