"""Documents from a Parquet column."""

from collections.abc import Iterator
from typing import Any

from stackjax.data.piece import Piece
from stackjax.data.text_field import NullTexts, check_names, text_of
from stackjax.runtime.errors import UserError

ROWS_AT_A_TIME = 1024


def list_parquet(path: str, text_field: str, null_texts: NullTexts) -> Iterator[Piece]:
    """Yields a piece for each row group in a file.

    Raises:
      UserError: The file is not Parquet, or the column has no texts.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            metadata, schema = file.metadata, file.schema_arrow
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path!r} is not a Parquet file: {_one_line(error)}") from error
    try:
        _check_column(schema, text_field, null_texts)
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


def read_parquet(piece: Piece, text_field: str, null_texts: NullTexts) -> Iterator[str | None]:
    """Yields the texts in the row groups of a piece."""
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(piece.source, page_checksum_verification=True) as file:
            groups = map(file.metadata.row_group, range(piece.start))
            row = 1 + sum(group.num_rows for group in groups)
            for value in _values(file, range(piece.start, piece.stop), text_field):
                try:
                    yield text_of(_plain(value), text_field, null_texts)
                except UserError as error:
                    raise UserError(f"{piece.source!r}, row {row}: {error}") from error
                row += 1
    except (pyarrow.ArrowException, OSError) as error:
        where = f"{piece.source!r}, row group {piece.start}"
        raise UserError(f"{where} cannot be read: {_one_line(error)}") from error


def _values(file: Any, groups: range, text_field: str) -> Iterator[Any]:
    # A dotted name would also select nested columns.
    for batch in file.iter_batches(ROWS_AT_A_TIME, groups, [text_field]):
        yield from batch.column(batch.schema.get_field_index(text_field))


def _plain(value: Any) -> object:
    """Returns a value as undecoded bytes, or None."""
    import pyarrow

    if isinstance(value, pyarrow.DictionaryScalar):
        value = value.value
    buffer = value.as_buffer() if value.is_valid else None
    return None if buffer is None else buffer.to_pybytes()


def _check_column(schema: Any, text_field: str, null_texts: NullTexts) -> None:
    """Raises UserError unless the text field is a top-level column with texts."""
    import pyarrow

    check_names(schema.names, text_field)
    index = schema.get_field_index(text_field)
    if index < 0:
        raise UserError(f"several columns are called {text_field!r}.")
    kind = schema.field(index).type
    if isinstance(kind, pyarrow.DictionaryType):
        kind = kind.value_type
    if pyarrow.types.is_null(kind) and null_texts == "skip":
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
