"""Rows that cannot be read: skipped with exact counts, or refused with file and line."""

import gzip
import json
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
import zstandard

from stackjax.data import parts
from stackjax.data import piece as reading
from stackjax.data.config import PrepareConfig
from stackjax.data.counts import read_inputs
from stackjax.data.prepare import prepare
from stackjax.runtime.errors import UserError

MISSING = {
    b'{"text": null}': "null text",
    b'{"words": "a"}': "no text field",
    b"{}": "no text field",
}
INVALID = {
    b'{"text": "a"': "not JSON",
    b"plain": "not JSON",
    b'{"text": "a"} {"text": "b"}': "not JSON",
    b'{"text": "\xe9"}': "not UTF-8",
    b"[1]": "not a JSON object",
    b'"a"': "not a JSON object",
    b'{"text": 1}': "text is not a string",
    b'{"text": ["a"]}': "text is not a string",
    b'{"text": "a", "text": "b"}': "text field given twice",
    b'{"text": "a", "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}": "nested too deep",
}
BAD = MISSING | INVALID
GOOD = [json.dumps({"text": f"document {i}"}).encode() for i in range(40)]

LINES = b"\n".join([*GOOD, b""])


@pytest.fixture(autouse=True)
def small_parts(monkeypatch, capsys):
    """Makes parts small, and hides the output."""
    monkeypatch.setattr(reading, "PIECE_BYTES", 500)
    monkeypatch.setattr(parts, "PART_BYTES", 1500)


def mixed() -> list[bytes]:
    """Returns every bad row three times, and good and blank rows between them."""
    rows = [row for i, good in enumerate(GOOD) for row in (good, list(BAD)[i % len(BAD)])]
    return [*rows, b"", b"  ", *GOOD]


def run(directory: Path, *names: str, **options):
    """Prepares files and returns the counts by input file."""
    inputs = [str(directory / name) for name in names]
    output = str(directory / "out")
    options = {"tokenizer": "bytes", "num_processes": 1, "validation_fraction": 0.0} | options
    prepare(PrepareConfig(paths=(*inputs, output), **options))
    return list(read_inputs(output))


SKIP = dict(on_missing="skip", on_invalid="skip")


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_bad_rows_are_skipped_with_exact_counts(tmp_path, suffix):
    compress = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}[suffix]
    name, rows = f"a.jsonl{suffix}", mixed()
    (tmp_path / name).write_bytes(compress(b"\n".join(rows)))
    (counts,) = run(tmp_path, name, **SKIP)
    assert counts.documents == sum(row in GOOD for row in rows) == 80
    assert Counter(counts.left_out) == Counter(BAD[row] for row in rows if row in BAD)


@pytest.mark.parametrize("row", BAD, ids=range(len(BAD)))
@pytest.mark.parametrize("index", [0, 30])
def test_first_bad_row_is_refused_with_file_and_line(tmp_path, row, index):
    option = "missing" if row in MISSING else "invalid"
    other = "invalid" if row in MISSING else "missing"
    rows = [*GOOD[:index], row, *GOOD, row]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(rows))
    with pytest.raises(UserError) as error:
        run(tmp_path, "a.jsonl", **{f"on_{other}": "skip"})
    message = str(error.value)
    assert "\n" not in message and "a.jsonl" in message
    if not message.endswith("jq -c '.[]' " + str(tmp_path / "a.jsonl")):
        assert f"a.jsonl', line {index + 1}: " in message
        assert message.endswith(f"; --on-{option} skip leaves it out.")
    assert [path.name for path in tmp_path.iterdir() if path.name == "out"] == []


FILES: dict[str, tuple[bytes, int, str]] = {
    "cut.jsonl.gz": (gzip.compress(b"\n".join(GOOD))[:-4], 39, "damaged rest of a file"),
    "cut.jsonl.zst": (zstandard.compress(LINES) + b"\x28\xb5", 40, "damaged rest of a file"),
    "whole.jsonl.zst": (zstandard.compress(LINES) * 2, 80, ""),
    "tail.jsonl.gz": (gzip.compress(b"\n".join(GOOD)) + b"junk", 39, "damaged rest of a file"),
    "empty.jsonl.gz": (b"", 0, "damaged rest of a file"),
    "junk.jsonl.zst": (b"junk" * 9, 0, "damaged rest of a file"),
    "junk.parquet": (b"junk" * 9, 0, "damaged rest of a file"),
    "latin.txt": (b"caf\xe9", 0, "not UTF-8"),
    "binary.txt": (b"MZ\0\1\2", 0, "not text"),
}


@pytest.mark.parametrize("name", FILES)
def test_damaged_files_are_skipped_from_the_damage_on(tmp_path, name):
    content, documents, reason = FILES[name]
    (tmp_path / "good.jsonl").write_bytes(b"\n".join(GOOD))
    (tmp_path / name).write_bytes(content)
    good, counts = run(tmp_path, "good.jsonl", name, on_invalid="skip")
    assert good.documents == 40
    assert counts.documents == documents
    assert counts.left_out == ({reason: 1} if reason else {})


def test_columns_without_texts_are_counted_by_row(tmp_path):
    (tmp_path / "good.jsonl").write_bytes(b"\n".join(GOOD))
    pa.parquet.write_table(pa.table({"words": ["a"] * 7}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a.parquet': no field 'text', only 'words'"):
        run(tmp_path, "good.jsonl", "a.parquet")
    _, counts = run(tmp_path, "good.jsonl", "a.parquet", on_missing="skip")
    assert counts.left_out == {"no text field": 7}


def test_damaged_page_leaves_out_the_rest_of_its_row_group(tmp_path):
    path, options = tmp_path / "a.parquet", dict(compression="none", use_dictionary=False)
    table = pa.table({"text": [f"ok {i:06d}" for i in range(6000)]})
    pa.parquet.write_table(
        table, path, row_group_size=3000, write_page_checksum=True, **options
    )
    data = bytearray(path.read_bytes())
    data[20_000] ^= 1
    path.write_bytes(data)
    (counts,) = run(tmp_path, "a.parquet", on_invalid="skip")
    assert counts.left_out == {"damaged rest of a file": 1}
    assert 3000 <= counts.documents < 6000


def test_unreadable_file_is_no_invalid_row(tmp_path, monkeypatch):
    pa.parquet.write_table(pa.table({"text": ["a"]}), tmp_path / "a.parquet")

    def fail(*args, **options):
        raise PermissionError(13, "Permission denied", "a.parquet")

    monkeypatch.setattr("pyarrow.parquet.ParquetFile", fail)
    with pytest.raises(PermissionError):
        run(tmp_path, "a.parquet", on_invalid="skip")
