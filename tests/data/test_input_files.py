"""Inputs of many files and in other places: directories, nested fields, archives, buckets."""

import gzip
import io
import json
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import zstandard
from fake_gcs import FakeGcs

from stackjax.data import piece as pieces_of_inputs
from stackjax.data.documents import list_pieces, read_documents
from stackjax.data.input_files import InputFile, find_files
from stackjax.data.text_field import LeftOut, Reading
from stackjax.data.token_documents import TokenRules
from stackjax.runtime.errors import UserError

RULES = TokenRules(vocab_size=300, begin_ids=(), end_id=0)


def lines(*texts: str) -> bytes:
    return b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts)


def read(*inputs: Path | str, **options) -> list:
    """Returns the documents in some inputs."""
    reading = Reading(tokens=RULES, **options)
    names = tuple(map(str, inputs))
    pieces = list(list_pieces(names, "unused", reading, Counter()))
    return [text for piece in pieces for text in read_documents(piece, reading)]


def write_tree(directory: Path, names: list[str]) -> None:
    for name in names:
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(lines(name))


# Files, then the training files, the validation files and the number of test files.
LAYOUTS: dict[str, tuple[list[str], list[str], list[str], int]] = {
    "plain": (["b.jsonl", "a.jsonl", "c/a.jsonl"], ["a.jsonl", "b.jsonl", "c/a.jsonl"], [], 0),
    "hub": (
        [
            *("README.md", ".gitattributes", "dataset_infos.json", "LICENSE", ".cache/x.jsonl"),
            *("data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl"),
            *("data/validation-00000-of-00001.jsonl", "data/test-00000-of-00001.jsonl"),
        ],
        ["data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl"],
        ["data/validation-00000-of-00001.jsonl"],
        1,
    ),
    "directories": (
        ["train/a.jsonl", "dev/b.jsonl", "test/c.jsonl", "test/d.jsonl"],
        ["train/a.jsonl"],
        ["dev/b.jsonl"],
        2,
    ),
    "dots": (
        ["en/c4-train.00001.json", "en/c4-validation.00000.json"],
        ["en/c4-train.00001.json"],
        ["en/c4-validation.00000.json"],
        0,
    ),
    "words within words": (
        ["latest.jsonl", "training_a.jsonl", "evaluator.jsonl"],
        ["evaluator.jsonl", "latest.jsonl", "training_a.jsonl"],
        [],
        0,
    ),
    "other names beside validation": (
        ["a.jsonl", "valid.jsonl"],
        ["a.jsonl"],
        ["valid.jsonl"],
        0,
    ),
    "text": (
        ["a/test/b.py", "a/test_c.py", "d.py"],
        ["a/test/b.py", "a/test_c.py", "d.py"],
        [],
        0,
    ),
    "text in splits": (
        ["train/a.txt", "train/test/b.txt", "validation/c.txt", "test/d.txt"],
        ["train/a.txt", "train/test/b.txt"],
        ["validation/c.txt"],
        1,
    ),
}


def check_layout(root: str, name: str) -> None:
    """Checks the files found for a layout."""
    _, train, validation, num_tests = LAYOUTS[name]
    left_out = Counter()
    found = find_files(root, left_out)
    held_out = False if validation else None
    expected = [InputFile(f"{root}/{each}", held_out) for each in train]
    expected += [InputFile(f"{root}/{each}", True) for each in validation]
    assert found == sorted(expected, key=lambda file: file.path)
    assert left_out == ({"file of a test split": num_tests} if num_tests else {})


@pytest.mark.parametrize("name", LAYOUTS)
def test_directories_are_read_as_the_hub_reads_them(tmp_path, name):
    write_tree(tmp_path, LAYOUTS[name][0])
    check_layout(str(tmp_path), name)
    if not name.startswith("text"):
        assert len(read(tmp_path)) == len(LAYOUTS[name][1] + LAYOUTS[name][2])


def test_directory_of_several_formats_is_refused(tmp_path):
    write_tree(tmp_path, ["a.jsonl", "b.txt"])
    with pytest.raises(UserError, match=r"'a.jsonl' \(JSON lines\) and 'b.txt' \(text\); name"):
        read(tmp_path)


@pytest.mark.parametrize("names", [[], ["README.md", ".hidden"]])
def test_directory_without_data_is_refused(tmp_path, names):
    write_tree(tmp_path, names)
    with pytest.raises(UserError, match="is a directory without data files"):
        read(tmp_path)


def test_links_of_the_hub_cache_are_followed(tmp_path):
    write_tree(tmp_path, ["blobs/0123", "blobs/4567"])
    snapshot = tmp_path / "snapshots" / "main"
    snapshot.mkdir(parents=True)
    (snapshot / "a.jsonl").symlink_to(tmp_path / "blobs" / "0123")
    (snapshot / "data").symlink_to(tmp_path / "blobs2", target_is_directory=True)
    write_tree(tmp_path / "blobs2", ["b.jsonl"])
    assert read(snapshot) == ["blobs/0123", "b.jsonl"]


def test_dolma_documents_are_read(tmp_path):
    row = {"id": "7", "text": "one", "source": "cc", "added": "2023", "metadata": {"text": 1}}
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(json.dumps(row).encode() + b"\n"))
    assert read(tmp_path) == ["one"]


NESTED: dict[str, tuple[list, str, list]] = {
    "path": ([{"a": {"b": "x"}}], "a.b", ["x"]),
    "deep path": ([{"a": {"b": {"c": "x"}}}], "a.b.c", ["x"]),
    "dotted name wins": ([{"a": {"b": "no"}, "a.b": "x"}], "a.b", ["x"]),
    "null in a path": ([{"a": {"b": "x"}}, {"a": None}, {"a": {"b": None}}], "a.b", ["x"]),
}


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize("name", NESTED)
def test_dots_lead_into_nested_fields(tmp_path, name, suffix):
    rows, field, texts = NESTED[name]
    path = tmp_path / f"a.{suffix}"
    if suffix == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pa.parquet.write_table(pa.Table.from_pylist(rows), path)
    nulls = [LeftOut("null text")] * (len(rows) - len(texts))
    assert read(path, text_field=field, on_missing="skip") == texts + nulls
    if nulls:
        with pytest.raises(UserError, match=r"(line|row) 2: .* null; --on-missing skip"):
            read(path, text_field=field)


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize("field", ["a.c", "b.b", "a.b.c", "b"])
def test_missing_nested_field_is_named(tmp_path, suffix, field):
    path = tmp_path / f"a.{suffix}"
    rows = [{"a": {"b": "x"}, "d": "y"}]
    if suffix == "jsonl":
        path.write_text(json.dumps(rows[0]))
    else:
        pa.parquet.write_table(pa.Table.from_pylist(rows), path)
    with pytest.raises(UserError, match=f"no field '{field}', only 'a', 'd'"):
        read(path, text_field=field)


@pytest.mark.parametrize(
    "row", ['{"a": {"b": "x", "b": "y"}}', '{"a": {"b": "x"}, "a": {"b": 1}}']
)
def test_repeated_nested_field_is_refused(tmp_path, row):
    (tmp_path / "a.jsonl").write_text(row)
    with pytest.raises(UserError, match=r"the field '.' occurs 2 times"):
        read(tmp_path / "a.jsonl", text_field="a.b")


def test_same_name_at_other_depths_is_no_repeat(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"b": 1, "a": {"b": "x", "a": 2}, "c": [{"a": 1}]}')
    assert read(tmp_path / "a.jsonl", text_field="a.b") == ["x"]


def tar_of(members: dict[str, bytes]) -> bytes:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return data.getvalue()


TAR = tar_of(
    {
        "0.txt": b"zero",
        "0.json": b'{"text": "no"}',
        "a/1.json": b'{"text": "one"}',
        "a/1.jpg": b"\xff\xd8",
        "a/2.jpg": b"\xff\xd8",
        "a/3.txt": b"caf\xe9",
        "a/4.txt": b"four",
    }
)
BEFORE = ["zero", "one", LeftOut("no text field"), LeftOut("not UTF-8"), "four"]


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz", ".tgz", ".tar.zst"])
def test_samples_of_a_tar_are_read(tmp_path, suffix):
    compress = {".tar": bytes, ".tar.zst": zstandard.compress}.get(suffix, gzip.compress)
    path = tmp_path / f"a{suffix}"
    path.write_bytes(compress(TAR))
    assert read(path, on_missing="skip", on_invalid="skip") == BEFORE
    with pytest.raises(UserError, match=r"sample 'a/2': no .txt and no .json, only jpg"):
        read(path)
    with pytest.raises(UserError, match="sample 'a/3': this is not UTF-8 text"):
        read(path, on_missing="skip")


@pytest.mark.parametrize("cut", ["member", "end"])
@pytest.mark.parametrize("compress", [bytes, gzip.compress])
def test_cut_tar_is_refused(tmp_path, cut, compress):
    data = tar_of({f"{i}.txt": bytes([65 + i]) * 900 for i in range(4)})
    path = tmp_path / ("a.tar" if compress is bytes else "a.tar.gz")
    # A member has a header of 512 bytes and two blocks.
    path.write_bytes(compress(data[: 3 * 1536 + 700 * (cut == "member")]))
    with pytest.raises(UserError, match=r"archive is (damaged or )?truncated"):
        read(path)
    found = read(path, on_invalid="skip")
    # More members of the sample before the damage may be missing.
    whole = 2 if cut == "member" else 3
    assert found[:-1] == ["A" * 900, "B" * 900, "C" * 900][:whole]
    assert found[-1] == LeftOut("damaged rest of a file")


@pytest.fixture(scope="module")
def gcs():
    """A bucket with a file of every format."""
    with FakeGcs("bucket") as server:
        texts = [f"text {i}" for i in range(50)]
        table = io.BytesIO()
        pa.parquet.write_table(pa.table({"text": texts}), table, row_group_size=20)
        tokens = np.array([1, 2, 0, 3, 0], "<u2").tobytes()
        for name, data in {
            "jsonl/a.jsonl": lines(*texts),
            "jsonl.gz/a.jsonl.gz": gzip.compress(lines(*texts)),
            "parquet/a.parquet": table.getvalue(),
            "text/a.txt": b"one",
            "text/b/c.txt": b"two",
            "tar/a.tar": tar_of({"0.txt": b"zero"}),
            "tokens/a.bin": tokens,
            "mixed/a.txt": b"one",
            "mixed/b.jsonl": lines("two"),
        }.items():
            server.put("bucket", name, data)
        for name in LAYOUTS["hub"][0]:
            server.put("bucket", f"hub/{name}", lines(name))
        yield server


FIFTY = [f"text {i}" for i in range(50)]
IN_BUCKET = {
    "jsonl/a.jsonl": FIFTY,
    "jsonl/*.jsonl": FIFTY,
    "jsonl": FIFTY,
    "jsonl.gz/a.jsonl.gz": FIFTY,
    "parquet/*": FIFTY,
    "text/**": ["one", "two"],
    "text": ["one", "two"],
    "tar/a.tar": ["zero"],
    "tokens": [[1, 2], [3]],
}


@pytest.mark.parametrize("name", IN_BUCKET)
def test_inputs_in_a_bucket_are_read(gcs, monkeypatch, name):
    monkeypatch.setattr(pieces_of_inputs, "PIECE_BYTES", 200)
    found = read(f"gs://bucket/{name}")
    assert [x if isinstance(x, str) else x.tolist() for x in found] == IN_BUCKET[name]


def test_directory_in_a_bucket_has_the_splits_of_the_hub(gcs):
    check_layout("gs://bucket/hub", "hub")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("absent.jsonl", "matches no file"),
        ("absent/*", "matches no file"),
        ("mixed", "files of several formats"),
    ],
)
def test_unusable_input_in_a_bucket_is_named(gcs, name, message):
    with pytest.raises(UserError, match=f"gs://bucket/.*{message}"):
        read(f"gs://bucket/{name}")


def test_change_of_an_input_in_a_bucket_is_found(gcs):
    gcs.put("bucket", "changed/a.jsonl", lines("one"))
    reading = Reading()
    (piece,) = list_pieces(("gs://bucket/changed/a.jsonl",), "", reading, Counter())
    gcs.put("bucket", "changed/a.jsonl", lines("two"))
    with pytest.raises(UserError, match=r"gs://bucket/changed/a.jsonl' has changed"):
        list(read_documents(piece, reading))
