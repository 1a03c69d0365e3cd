"""Documents from JSON lines: a JSON object per line, optionally compressed."""

import contextlib
import json
from collections.abc import Iterator
from typing import BinaryIO

from stackjax.data.compression import open_compressed
from stackjax.data.piece import Piece
from stackjax.data.text_field import NullTexts, check_names, text_of
from stackjax.runtime.errors import UserError

FIRST_LINE_BYTES = 2**20
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
# Python refuses integers with thousands of digits, and only the text is used here.
_DECODER = json.JSONDecoder(parse_int=float)


def check_first_line(
    path: str, is_compressed: bool, text_field: str, null_texts: NullTexts
) -> None:
    """Raises UserError if a file is not JSON lines, or the first line has no text.

    First lines above 1 MiB are checked later, while reading.
    """
    with _opened(path, is_compressed) as file:
        number, line = 1, file.readline(FIRST_LINE_BYTES)
        while line and not line.strip():
            number, line = number + 1, file.readline(FIRST_LINE_BYTES)
    if line.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in line:
        raise UserError(
            f"{path!r} is not UTF-8 text, perhaps UTF-16; convert it: "
            f"iconv -f UTF-16 -t UTF-8 {path}"
        )
    if line.removeprefix(_BYTE_ORDER_MARK).lstrip().startswith(b"["):
        raise UserError(
            f"{path!r} is a JSON array, not JSON lines; convert it: jq -c '.[]' {path}"
        )
    if line and (line.endswith(b"\n") or len(line) < FIRST_LINE_BYTES):
        try:
            _text_of_line(line, text_field, null_texts)
        except UserError as error:
            raise UserError(f"{path!r}, line {number}: {error}") from error


def read_json_lines(
    piece: Piece, text_field: str, null_texts: NullTexts
) -> Iterator[str | None]:
    """Yields the text in each line; skips blank lines."""
    is_compressed = piece.format == "compressed_jsonl"
    with _opened(piece.source, is_compressed) as file:
        lines = file if is_compressed else _lines_between(file, piece.start, piece.stop)
        for count, line in enumerate(lines):
            if line.strip():
                try:
                    yield _text_of_line(line, text_field, null_texts)
                except UserError as error:
                    number = _first_line(piece) + count
                    raise UserError(f"{piece.source!r}, line {number}: {error}") from error


@contextlib.contextmanager
def _opened(path: str, is_compressed: bool) -> Iterator[BinaryIO]:
    with open_compressed(path) if is_compressed else open(path, "rb") as file:
        yield file


def _lines_between(file: BinaryIO, start: int, stop: int) -> Iterator[bytes]:
    """Yields the lines with a first byte in [start, stop)."""
    if start:
        file.seek(start - 1)
        start += len(file.readline()) - 1
    while start < stop and (line := file.readline()):
        start += len(line)
        yield line


def _first_line(piece: Piece) -> int:
    """Returns the line number at the start of a piece, from 1."""
    if piece.start == 0:
        return 1
    with open(piece.source, "rb") as file:
        return 1 + sum(1 for _ in _lines_between(file, 0, piece.start))


def _text_of_line(line: bytes, text_field: str, null_texts: NullTexts) -> str | None:
    row = _parse(line)
    if not isinstance(row, dict):
        raise UserError(f"not a JSON object but {type(row).__name__}.")
    check_names(row, text_field)
    if line.count(f'"{text_field}"'.encode()) > 1:
        _check_field_once(line, text_field)
    return text_of(row[text_field], text_field, null_texts)


def _parse(line: bytes) -> object:
    """Returns the JSON value in a line; UserError for invalid JSON."""
    try:
        return _DECODER.decode(line.removeprefix(_BYTE_ORDER_MARK).decode("utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"not UTF-8: {error}.") from error
    except RecursionError as error:
        raise UserError("JSON that is nested too deep.") from error
    except json.JSONDecodeError as error:
        raise UserError(f"not JSON: {error.msg}, column {error.colno}{_hint(line)}.") from error


def _hint(line: bytes) -> str:
    """Returns a hint about the file, for a line with invalid JSON."""
    if b"\r" in line.strip():
        return "; perhaps its lines end in a lone CR: tr '\\r' '\\n' converts them"
    if line.rstrip().endswith((b"{", b"[", b",")):
        return "; perhaps one object over several lines: jq -c . makes it one line"
    return ""


def _check_field_once(line: bytes, text_field: str) -> None:
    """Raises UserError if a line has the text field twice (Python would use the last)."""

    def count(pairs: list[tuple[str, object]]) -> int:
        return sum(name == text_field for name, _ in pairs)

    decoder = json.JSONDecoder(parse_int=float, object_pairs_hook=count)
    times = decoder.decode(line.removeprefix(_BYTE_ORDER_MARK).decode("utf-8"))
    if times > 1:
        raise UserError(f"the field {text_field!r} occurs {times} times.")
