"""Documents from a Parquet column."""

import contextlib
from collections.abc import Iterator
from typing import Any

from stackjax.data.compression import DAMAGED
from stackjax.data.piece import Piece
from stackjax.data.text_field import BadRow, LeftOut, Reading, leave_out, no_field, text_of
from stackjax.files.input_file import open_input
from stackjax.files.storage import is_remote
from stackjax.runtime.errors import UserError

ROWS_AT_A_TIME = 1024


def list_parquet(path: str, num_bytes: int, reading: Reading) -> Iterator[Piece]:
    """Yields a piece for each row group in a file.

    Raises:
      UserError: The file is not Parquet, or the column has no texts.
    """
    import pyarrow

    try:
        with _opened(path) as file:
            metadata, schema = file.metadata, file.schema_arrow
    except (pyarrow.ArrowException, OSError) as error:
        damage = BadRow(f"this is not a Parquet file: {_one_line(error)}", DAMAGED)
        leave_out(damage, reading, lambda: f"{path!r}")
        # Without row groups; counted when the file is read.
        yield Piece(format="parquet", source=path, num_bytes=num_bytes)
        return
    try:
        _check_column(schema, reading)
    except BadRow as error:
        leave_out(error, reading, lambda: f"{path!r}")
    except UserError as error:
        raise UserError(f"{path!r}: {error}") from error
    for group in range(metadata.num_row_groups):
        yield Piece(
            format="parquet",
            source=path,
            start=group,
            stop=group + 1,
            num_bytes=metadata.row_group(group).total_byte_size,
        )


def read_parquet(piece: Piece, reading: Reading) -> Iterator[str | LeftOut]:
    """Yields the texts in the row groups of a piece."""
    import pyarrow

    try:
        with _opened(piece.source) as file:
            yield from _read_rows(piece, file, reading)
    except (pyarrow.ArrowException, OSError) as error:
        # A plain OSError is from pyarrow, about the content; others are about the disk.
        if isinstance(error, OSError) and type(error) is not OSError:
            raise
        damage = BadRow(f"it cannot be read: {_one_line(error)}", DAMAGED)
        place = f"{piece.source!r}, row group {piece.start}"
        yield leave_out(damage, reading, lambda: place)


@contextlib.contextmanager
def _opened(path: str) -> Iterator[Any]:
    import pyarrow.parquet

    with contextlib.ExitStack() as stack:
        # pyarrow reads files on disks faster by itself.
        source = stack.enter_context(open_input(path)) if is_remote(path) else path
        yield stack.enter_context(
            pyarrow.parquet.ParquetFile(source, page_checksum_verification=True)
        )


def _read_rows(piece: Piece, file: Any, reading: Reading) -> Iterator[str | LeftOut]:
    row_counts = [file.metadata.row_group(group).num_rows for group in range(piece.stop)]
    names = _path_of(file.schema_arrow, reading.text_field)
    if names is None:
        rows = sum(row_counts[piece.start :])
        yield from [LeftOut("no text field")] * rows
        return
    row = 1 + sum(row_counts[: piece.start])
    for value in _values(file, range(piece.start, piece.stop), names):
        try:
            yield text_of(_plain(value), reading.text_field)
        except BadRow as error:
            place = f"{piece.source!r}, row {row}"
            yield leave_out(error, reading, lambda place=place: place)
        row += 1


def _path_of(schema: Any, text_field: str) -> list[str] | None:
    """Returns the names of a column and its nested fields; None if missing.

    A column whose name has dots wins.
    """
    import pyarrow

    if text_field in schema.names:
        return [text_field]
    names = text_field.split(".")
    fields = {field.name: field.type for field in schema}
    for depth, name in enumerate(names):
        if name not in fields:
            return None
        kind = fields[name]
        if depth + 1 < len(names) and not pyarrow.types.is_struct(kind):
            return None
        fields = {} if depth + 1 == len(names) else {field.name: field.type for field in kind}
    return names


def _values(file: Any, groups: range, names: list[str]) -> Iterator[Any]:
    import pyarrow.compute

    compute: Any = pyarrow.compute
    # A dotted name selects nested columns too.
    for batch in file.iter_batches(ROWS_AT_A_TIME, groups, [".".join(names)]):
        column = batch.column(batch.schema.get_field_index(names[0]))
        yield from compute.struct_field(column, names[1:]) if names[1:] else column


def _plain(value: Any) -> object:
    """Returns a value as undecoded bytes, or None."""
    import pyarrow

    if isinstance(value, pyarrow.DictionaryScalar):
        value = value.value
    buffer = value.as_buffer() if value.is_valid else None
    return None if buffer is None else buffer.to_pybytes()


def _check_column(schema: Any, reading: Reading) -> None:
    """Raises UserError unless the text field is a column with texts."""
    import pyarrow

    text_field = reading.text_field
    names = _path_of(schema, text_field)
    if names is None:
        raise no_field(schema.names, text_field)
    index = schema.get_field_index(names[0])
    if index < 0:
        raise UserError(f"several columns are called {names[0]!r}.")
    kind = schema.field(index).type
    for name in names[1:]:
        kind = kind.field(name).type
    if isinstance(kind, pyarrow.DictionaryType):
        kind = kind.value_type
    if pyarrow.types.is_null(kind) and reading.on_missing == "skip":
        return
    if not any(is_text(kind) for is_text in _text_types()):
        texts = [f.name for f in schema if any(is_text(f.type) for is_text in _text_types())]
        raise UserError(
            f"the field {text_field!r} is not a text but {kind}; fields of texts: "
            f"{', '.join(map(repr, texts)) or 'none'}; name one with --text-field."
        )


def _text_types() -> list[Any]:
    from pyarrow import types

    return [
        types.is_string,
        types.is_large_string,
        types.is_string_view,
        types.is_binary,
        types.is_large_binary,
        types.is_binary_view,
    ]


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
