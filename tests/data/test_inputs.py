"""Unusual input files: accepted variants, damage and special files."""

import gzip
import json
import os
import struct
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
import zstandard

from stackjax.data.documents import list_pieces, read_documents
from stackjax.data.text_field import LeftOut, Reading
from stackjax.runtime.errors import UserError


def lines(*texts: str | None) -> bytes:
    return b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts)


def wide_window(data: bytes) -> bytes:
    """Compresses like `zstd --long=31` with unknown stream length."""
    options = zstandard.ZstdCompressionParameters(window_log=31, enable_ldm=True)
    stream = zstandard.ZstdCompressor(compression_params=options).compressobj()
    return stream.compress(data) + stream.flush()


zstd = zstandard.ZstdCompressor().compress
SKIPPABLE = struct.pack("<II", 0x184D2A50, 4) + b"abcd"
RANDOM = lines(*(os.urandom(50).hex() for _ in range(400)))
DEEP = b'{"text": "a", "x": ' + b"[" * 200_000 + b"]" * 200_000 + b"}\n"

READ: dict[str, tuple[bytes, list[str]]] = {
    "a.ndjson": (lines("one", "two"), ["one", "two"]),
    "a.jsonlines": (lines("one", "two"), ["one", "two"]),
    "a.JSONL": (lines("one", "two"), ["one", "two"]),
    "a.Json": (lines("one", "two"), ["one", "two"]),
    "a.JSONL.GZ": (gzip.compress(lines("one")), ["one"]),
    "a.ndjson.Zst": (zstd(lines("one")), ["one"]),
    "members.jsonl.gz": (
        b"".join(map(gzip.compress, (lines("one"), lines("two"), b"", lines("three")))),
        ["one", "two", "three"],
    ),
    "padded.jsonl.gz": (gzip.compress(lines("one", "two")) + bytes(512), ["one", "two"]),
    "nothing.jsonl.gz": (gzip.compress(b""), []),
    "frames.jsonl.zst": (
        SKIPPABLE + zstd(lines("one")) + SKIPPABLE + zstd(lines("two")) + SKIPPABLE,
        ["one", "two"],
    ),
    "halves.jsonl.zst": (zstd(lines("one")[:5]) + zstd(lines("one")[5:]), ["one"]),
    "window.jsonl.zst": (wide_window(lines("one", "two")), ["one", "two"]),
    "many.jsonl.zst": (zstd(lines("x" * 9_000_000, "y")), ["x" * 9_000_000, "y"]),
    "empty.jsonl": (b"", []),
    "mark.jsonl": (b"\xef\xbb\xbf" + lines("one", "two"), ["one", "two"]),
    "marks.jsonl": (b"\xef\xbb\xbf" + lines("a") + b"\xef\xbb\xbf" + lines("b"), ["a", "b"]),
    "mark.txt": (b"\xef\xbb\xbfhello", ["hello"]),
    "crlf.jsonl": (lines("one", "two").replace(b"\n", b"\r\n"), ["one", "two"]),
    "crlf.txt": (b"one\r\ntwo\rthree", ["one\r\ntwo\rthree"]),
    "inner_cr.jsonl": (b'{"text":\r"one"}\n', ["one"]),
    "unended.jsonl": (lines("one", "two")[:-1], ["one", "two"]),
    "separators.jsonl": (
        '{"text": "a\u2028b\u0085c\u2029"}\n'.encode(),
        ["a\u2028b\x85c\u2029"],
    ),
    "blank.jsonl": (lines("", "   ", "\0", "x"), ["", "   ", "\0", "x"]),
    "integer.jsonl": (b'{"text": "a", "id": ' + b"1" * 5000 + b"}\n", ["a"]),
    "nan.jsonl": (b'{"text": "a", "x": NaN, "y": -Infinity}\n', ["a"]),
    "surrogates.jsonl": (b'{"text": "a\\ud800b"}\n{"text": "\\ud83d\\ude00"}', ["a?b", "😀"]),
    "other_twice.jsonl": (b'{"id": 1, "text": "a", "id": 2}\n', ["a"]),
    "nested.jsonl": (b'{"text": "a", "x": {"text": "b"}}\n', ["a"]),
}

REFUSED: dict[str, tuple[bytes, str]] = {
    "empty.jsonl.gz": (b"", "is truncated"),
    "empty.jsonl.zst": (b"", "is truncated"),
    "cut.jsonl.gz": (gzip.compress(RANDOM)[:-200], "is truncated"),
    "cut.jsonl.zst": (zstd(RANDOM)[:-200], "is truncated"),
    "cut_frame.jsonl.zst": (zstd(lines("one")) + zstd(RANDOM)[:3], "is truncated"),
    "flipped.jsonl.gz": (gzip.compress(lines("one"))[:-6] + b"flip\0\0", "cannot be read"),
    "tail.jsonl.gz": (gzip.compress(lines("one")) + b"junk", "cannot be read"),
    "text.jsonl.gz": (lines("one"), "cannot be read"),
    "text.jsonl.zst": (lines("one"), "cannot be read"),
    "cr.jsonl": (lines("one", "two").replace(b"\n", b"\r"), "tr '\\r' '\\n' converts them"),
    "null.jsonl": (lines("one", None), "line 2: the field 'text' is not a text but null"),
    "nan_text.jsonl": (b'{"text": NaN}\n', "line 1: the field 'text' is not a text: nan"),
    "list.jsonl": (lines("one") + b"[1]\n", "line 2: not a JSON object but list"),
    "array.json": (b' [{"text": "a"}]', "is a JSON array, not JSON lines; convert it: jq -c"),
    "array.json.gz": (gzip.compress(b'[\n{"text": "a"}]'), "is a JSON array"),
    "pretty.json": (b'{\n "text": "a"\n}', "one object over several lines: jq -c . makes"),
    "deep.jsonl": (lines("one") + DEEP, "line 2: JSON that is nested too deep"),
    "twice.jsonl": (b'{"text": "a", "text": "b"}', "'text' occurs 2 times"),
    "utf16.jsonl": ('{"text": "a"}\n'.encode("utf-16"), "iconv -f UTF-16 -t UTF-8"),
    "utf16le.jsonl": ('{"text": "a"}\n'.encode("utf-16-le"), "iconv -f UTF-16 -t UTF-8"),
    "latin.jsonl": (b'{"text": "caf\xe9"}\n', "line 1: not UTF-8"),
    "utf16.txt": ("text".encode("utf-16"), "is not UTF-8 text"),
    "binary.txt": (b"MZ\0\1\2", "byte 2 is NUL"),
    "a.csv": (b"text,id\none,1\n", "ends in .csv"),
    "a.TSV": (b"text\tid\none\t1\n", "ends in .tsv"),
    "a.txt.gz": (gzip.compress(b"text"), "ends in .gz"),
    "a.jsonl.bz2": (b"", "ends in .bz2"),
    "a.zip": (b"PK", "ends in .zip"),
    "a.jsonl.txt": (lines("one"), "contains .jsonl but ends in .txt"),
    "a.parquet.part": (b"", "contains .parquet but ends in .part"),
    "a.pq": (b"", "is not a Parquet file"),
    "a.PARQUET": (b"PAR1junk", "is not a Parquet file"),
}


def read(path: Path | str, **options) -> list[str | LeftOut]:
    """Returns the documents in an input."""
    reading = Reading(**options)
    pieces = list(list_pieces((str(path),), "unused", reading, Counter()))
    return [text for piece in pieces for text in read_documents(piece, reading)]


def refusal(path: Path | str, **options) -> str:
    """Returns the error message for an input."""
    with pytest.raises((UserError, OSError)) as error:
        read(path, **options)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("name", READ)
def test_unusual_files_are_read_correctly(tmp_path, name):
    content, texts = READ[name]
    (tmp_path / name).write_bytes(content)
    assert read(tmp_path / name) == texts


@pytest.mark.parametrize("name", REFUSED)
def test_unreadable_files_are_refused_in_one_line(tmp_path, name):
    content, message = REFUSED[name]
    (tmp_path / name).write_bytes(content)
    assert message in refusal(tmp_path / name)


def unchecked_strings(*values: bytes) -> pa.Array:
    """Returns a string array with any bytes, not only UTF-8."""
    buffers = pa.array(values, pa.binary()).buffers()
    return pa.Array.from_buffers(pa.string(), len(values), buffers)


COLUMNS: dict[str, tuple[dict[str, pa.Array], list[str | None] | str]] = {
    "string": ({"text": pa.array(["a", "b"])}, ["a", "b"]),
    "large_string": ({"text": pa.array(["a"], pa.large_string())}, ["a"]),
    "string_view": ({"text": pa.array(["a", "b"], pa.string_view())}, ["a", "b"]),
    "dictionary": ({"text": pa.array(["a", "b", "a"]).dictionary_encode()}, ["a", "b", "a"]),
    "binary": ({"text": pa.array([b"a", "é".encode()])}, ["a", "é"]),
    "zero rows": ({"text": pa.array([], pa.string())}, []),
    "a name with a dot": ({"text.x": pa.array(["no"]), "text": pa.array(["a"])}, ["a"]),
    "nulls": (
        {"text": pa.array(["a", None])},
        "row 2: the field 'text' is not a text but null",
    ),
    "null in a dictionary": (
        {"text": pa.array(["a", None]).dictionary_encode()},
        "row 2: the field 'text' is not a text but null",
    ),
    "binary that is not UTF-8": (
        {"text": pa.array([b"a", b"\xff"])},
        "row 2: the field 'text'",
    ),
    "string that is not UTF-8": (
        {"text": unchecked_strings(b"a", b"\xff")},
        "row 2: the field",
    ),
    "list": ({"text": pa.array([["a"]]), "b": pa.array(["b"])}, "fields of texts: 'b'"),
    "struct": ({"text": pa.array([{"x": "no"}])}, "not a text but struct<x: string>"),
    "integer": ({"text": pa.array([1])}, "not a text but int64"),
    "nested": ({"meta": pa.array([{"text": "a"}])}, "no field 'text', only 'meta'"),
    "only nulls": ({"text": pa.nulls(2)}, "not a text but null"),
}


@pytest.mark.parametrize("name", COLUMNS)
def test_columns_of_any_type_are_read_or_refused(tmp_path, name):
    columns, expected = COLUMNS[name]
    path = tmp_path / "a.parquet"
    pa.parquet.write_table(pa.table(columns), path)
    if isinstance(expected, str):
        assert expected in refusal(path)
    else:
        assert read(path) == expected


def test_errors_in_later_row_groups_have_the_row_number(tmp_path):
    path = tmp_path / "a.parquet"
    table = pa.table({"text": ["a"] * 7 + [None]})
    pa.parquet.write_table(table, path, row_group_size=3)
    assert "row 8: the field" in refusal(path)


def test_duplicate_columns_are_refused(tmp_path):
    path = tmp_path / "a.parquet"
    pa.parquet.write_table(pa.table([["a"], ["b"]], names=["text", "text"]), path)
    assert "several columns are called 'text'" in refusal(path)


def test_flipped_bit_in_a_page_with_checksum_is_found(tmp_path):
    path = tmp_path / "a.parquet"
    options = dict(write_page_checksum=True, compression="none", use_dictionary=False)
    pa.parquet.write_table(pa.table({"text": ["ok"] * 3000}), path, **options)
    data = bytearray(path.read_bytes())
    data[5000] ^= 1
    path.write_bytes(data)
    assert "CRC checksum verification failed" in refusal(path)


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_nulls_are_skipped_on_request(tmp_path, name):
    path = tmp_path / name
    if name == "a.jsonl":
        path.write_bytes(lines("a", None, "b", None))
    else:
        pa.parquet.write_table(pa.table({"text": ["a", None, "b", None]}), path)
    null = LeftOut("null text")
    assert read(path, on_missing="skip") == ["a", null, "b", null]


@pytest.mark.parametrize("kind", ["pipe", "device", "pipe in a glob", "loop"])
def test_special_files_are_refused_without_blocking(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    if "pipe" in kind:
        os.mkfifo("a.jsonl")
    else:
        os.symlink("/dev/zero" if kind == "device" else "a.jsonl", "a.jsonl")
    with pytest.raises((UserError, OSError), match=r"'a\.jsonl'"):
        read("*.jsonl" if "glob" in kind else "a.jsonl")


def test_missing_field_is_found_before_reading(tmp_path):
    (tmp_path / "0.jsonl").write_bytes(lines("a"))
    (tmp_path / "1.jsonl.gz").write_bytes(gzip.compress(b'\n{"words": "a"}\n'))
    pa.parquet.write_table(pa.table({"words": ["a"]}), tmp_path / "2.parquet")
    for name in ("*.jsonl*", "*.parquet"):
        with pytest.raises(UserError, match=r"no field 'text', only 'words'"):
            list(list_pieces((str(tmp_path / name),), "unused", Reading(), Counter()))


def test_file_changed_while_reading_is_named(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines("one", "two"))
    (piece,) = list_pieces((str(path),), "unused", Reading(), Counter())
    texts = read_documents(piece, Reading())
    assert next(texts) == "one"
    path.write_bytes(lines("one", "two", "three"))
    with pytest.raises(UserError, match=r"a\.jsonl' has changed"):
        list(texts)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"a\.jsonl"):
        list(read_documents(piece, Reading()))
