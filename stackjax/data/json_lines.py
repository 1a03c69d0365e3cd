"""Documents from JSON lines: a JSON object per line, optionally compressed."""

import json
from collections.abc import Iterator
from typing import Any, BinaryIO

from stackjax.data.compression import opened
from stackjax.data.formats import is_compressed
from stackjax.data.piece import Piece
from stackjax.data.text_field import BadRow, LeftOut, Reading, find_field, leave_out, text_of
from stackjax.files.input_file import open_input
from stackjax.runtime.errors import UserError

FIRST_LINE_BYTES = 2**20
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
# Python refuses integers with thousands of digits, and only the text is used here.
_DECODER = json.JSONDecoder(parse_int=float)


def check_first_line(path: str, reading: Reading) -> None:
    """Raises UserError if a file is not JSON lines, or the first line is refused.

    First lines above 1 MiB are checked later, while reading.
    """
    try:
        with opened(path, is_compressed(path)) as file:
            number, line = 1, file.readline(FIRST_LINE_BYTES)
            while line and not line.strip():
                number, line = number + 1, file.readline(FIRST_LINE_BYTES)
    except BadRow as error:
        leave_out(error, reading, lambda: f"{path!r}")
        return
    if reading.on_invalid == "refuse":
        _check_format(path, line)
    if line and (line.endswith(b"\n") or len(line) < FIRST_LINE_BYTES):
        try:
            text_of_json(line, reading.text_field)
        except BadRow as error:
            leave_out(error, reading, lambda: f"{path!r}, line {number}")


def _check_format(path: str, line: bytes) -> None:
    """Raises UserError if the first line is from another format."""
    if line.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in line:
        raise UserError(
            f"{path!r} is not UTF-8 text, perhaps UTF-16; convert it: "
            f"iconv -f UTF-16 -t UTF-8 {path}"
        )
    if line.removeprefix(_BYTE_ORDER_MARK).lstrip().startswith(b"["):
        raise UserError(
            f"{path!r} is a JSON array, not JSON lines; convert it: jq -c '.[]' {path}"
        )


def read_json_lines(piece: Piece, reading: Reading) -> Iterator[str | LeftOut]:
    """Yields the text in each line; skips blank lines."""
    is_whole = piece.format == "compressed_jsonl"
    try:
        with opened(piece.source, is_whole) as file:
            lines = file if is_whole else _lines_between(file, piece.start, piece.stop)
            for count, line in enumerate(lines):
                if line.strip():
                    yield _read_line(line, piece, count, reading)
    except BadRow as error:
        yield leave_out(error, reading, lambda: f"{piece.source!r}")


def _read_line(line: bytes, piece: Piece, count: int, reading: Reading) -> str | LeftOut:
    def place() -> str:
        return f"{piece.source!r}, line {_first_line(piece) + count}"

    try:
        return text_of_json(line, reading.text_field)
    except BadRow as error:
        return leave_out(error, reading, place)


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
    with open_input(piece.source) as file:
        return 1 + sum(1 for _ in _lines_between(file, 0, piece.start))


def text_of_json(data: bytes, text_field: str) -> str:
    """Returns the text in a JSON object.

    Raises:
      BadRow: The data is not a JSON object with a text.
    """
    row = _parse(data)
    if not isinstance(row, dict):
        message = f"not a JSON object but {type(row).__name__}."
        raise BadRow(message, "not a JSON object")
    text = find_field(row, text_field)
    names = [text_field] if text_field in row else text_field.split(".")
    if any(data.count(json.dumps(name).encode()) > 1 for name in names):
        _check_field_once(data, names)
    return text_of(text, text_field)


def _parse(line: bytes) -> object:
    """Returns the JSON value in a line; BadRow for invalid JSON."""
    try:
        return _DECODER.decode(line.removeprefix(_BYTE_ORDER_MARK).decode("utf-8"))
    except UnicodeDecodeError as error:
        raise BadRow(f"not UTF-8: {error}.", "not UTF-8") from error
    except RecursionError as error:
        raise BadRow("JSON that is nested too deep.", "nested too deep") from error
    except json.JSONDecodeError as error:
        message = f"not JSON: {error.msg}, column {error.colno}{_hint(line)}."
        raise BadRow(message, "not JSON") from error


def _hint(line: bytes) -> str:
    """Returns a hint about the file, for a line with invalid JSON."""
    if b"\r" in line.strip():
        return "; perhaps its lines end in a lone CR: tr '\\r' '\\n' converts them"
    if line.rstrip().endswith((b"{", b"[", b",")):
        return "; perhaps one object over several lines: jq -c . makes it one line"
    return ""


def _check_field_once(data: bytes, names: list[str]) -> None:
    """Raises BadRow if an object has a field on the path twice (Python would use the last)."""
    pairs: Any = json.JSONDecoder(parse_int=float, object_pairs_hook=_Pairs).decode(
        data.removeprefix(_BYTE_ORDER_MARK).decode("utf-8")
    )
    for name in names:
        found = [value for key, value in pairs if key == name]
        if len(found) > 1:
            message = f"the field {name!r} occurs {len(found)} times."
            raise BadRow(message, "text field given twice")
        pairs = found[0]


class _Pairs(list[tuple[str, object]]):
    """The fields of a JSON object, with repeats."""
