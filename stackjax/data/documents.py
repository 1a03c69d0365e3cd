"""Documents of the inputs of `prepare`, cut into pieces that processes can share.

An input is a file or a glob, told by its name: JSON lines (`.jsonl` or `.json`, also with
`.gz` or `.zst`), Parquet (`.parquet`), any other file is the text of one document; or
`tfds:NAME`, a TensorFlow Datasets dataset that is read without TensorFlow.
"""

import dataclasses
import glob
import io
import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO, Literal

from stackjax.errors import UserError
from stackjax.storage import is_remote

PIECE_BYTES = 2**24
STDLIB = "stackjax_stdlib"

Format = Literal["text", "jsonl", "compressed_jsonl", "parquet", "tfds"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Piece:
    """Documents that one process reads on its own."""

    format: Format
    """How `source` is read."""
    source: str
    """A file, or the name of a TFDS dataset."""
    start: int = 0
    """First byte (jsonl), row group (parquet) or example (tfds)."""
    stop: int = 0
    """One past the last."""
    num_bytes: int
    """Size of what is read, about."""
    tfds_split: str | None = None
    """Split of the TFDS dataset that is read."""
    held_out: bool | None = None
    """Whether the input itself says that these documents are held out; None if silent."""
    data_dir: str | None = None
    """Where the TFDS dataset is; None is its own default."""


def list_pieces(inputs: tuple[str, ...], scratch: str) -> Iterator[Piece]:
    """Yields the pieces of all inputs, in an order that depends on the inputs alone.

    Args:
      scratch: Directory in which the built-in corpus may be generated.
    """
    for name in inputs:
        if name.startswith("tfds:"):
            yield from _list_tfds(name.removeprefix("tfds:"), scratch)
        else:
            for path in _expand(name):
                yield from _list_file(path)


def read_documents(piece: Piece, text_field: str) -> Iterator[str]:
    """Yields the documents of a piece.

    Args:
      text_field: The field, column or feature that holds the text.

    Raises:
      UserError: A document cannot be read; the message says where.
    """
    match piece.format:
        case "text":
            yield _read_text(piece.source)
        case "jsonl":
            with open(piece.source, "rb") as file:
                lines = _lines_between(file, piece.start, piece.stop)
                yield from _read_json(piece, lines, text_field)
        case "compressed_jsonl":
            try:
                with _decompress(piece.source) as file:
                    yield from _read_json(piece, file, text_field)
            except OSError as error:
                raise UserError(f"{piece.source!r} cannot be read: {error}.") from error
        case "parquet":
            yield from _read_parquet(piece, text_field)
        case "tfds":
            yield from _read_tfds(piece, text_field)


def _expand(name: str) -> list[str]:
    """Returns the files that an input names, sorted."""
    if is_remote(name):
        raise UserError(f"input {name!r} is in a bucket; mount it, or copy it to a disk.")
    if os.path.isdir(name):
        raise UserError(
            f"input {name!r} is a directory; name its files, such as '{name}/**/*.txt'."
        )
    if os.path.exists(name):
        return [name]
    paths = sorted(filter(os.path.isfile, glob.glob(name, recursive=True)))
    if not paths:
        raise UserError(f"input {name!r} matches no file.")
    return paths


def _list_file(path: str) -> Iterator[Piece]:
    size = os.path.getsize(path)
    if re.search(r"\.jsonl?\.(gz|zst)$", path):
        yield Piece(format="compressed_jsonl", source=path, num_bytes=size)
    elif re.search(r"\.jsonl?$", path):
        for start, stop in _ranges(size, size):
            yield Piece(
                format="jsonl",
                source=path,
                start=start,
                stop=stop,
                num_bytes=stop - start,
            )
    elif path.endswith(".parquet"):
        yield from _list_parquet(path)
    else:
        yield Piece(format="text", source=path, num_bytes=size)


def _ranges(length: int, num_bytes: int) -> list[tuple[int, int]]:
    """Returns the ranges that cut `length` units of `num_bytes` into whole pieces."""
    num_pieces = min(length, -(-num_bytes // PIECE_BYTES) or 1)
    bounds = [length * i // num_pieces for i in range(num_pieces + 1)] if length else []
    return list(itertools.pairwise(bounds))


def _read_text(path: str) -> str:
    with open(path, "rb") as file:
        data = file.read()
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path!r} is not UTF-8 text: {error}.") from error


def _lines_between(file: BinaryIO, start: int, stop: int) -> Iterator[bytes]:
    """Yields the lines whose first byte lies in [start, stop)."""
    if start:
        file.seek(start - 1)
        start += len(file.readline()) - 1
    while start < stop and (line := file.readline()):
        start += len(line)
        yield line


def _decompress(path: str) -> io.BufferedReader:
    import pyarrow

    codec = "gzip" if path.endswith(".gz") else "zstd"
    return io.BufferedReader(pyarrow.input_stream(path, compression=codec), 2**20)


def _read_json(piece: Piece, lines: Iterable[bytes], text_field: str) -> Iterator[str]:
    for number, line in enumerate(lines):
        if line.strip():
            try:
                yield _text_of_line(line, text_field)
            except ValueError as error:
                where = f"{piece.source!r}, line {_first_line(piece) + number}"
                raise UserError(f"{where}: {error}") from error


def _first_line(piece: Piece) -> int:
    """Returns the number of the line that a piece begins with, counted from 1."""
    if piece.start == 0:
        return 1
    with open(piece.source, "rb") as file:
        return 1 + sum(1 for _ in _lines_between(file, 0, piece.start))


def _text_of_line(line: bytes, text_field: str) -> str:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"not JSON: {error.msg}, column {error.colno}.") from error
    fields = row if isinstance(row, dict) else {}
    _check_names(fields, text_field)
    return _checked(fields[text_field], text_field)


def _check_names(names: Iterable[str], text_field: str) -> None:
    if text_field not in names:
        found = ", ".join(map(repr, names)) or "none"
        raise UserError(
            f"no field {text_field!r} (there are: {found}); name the one that holds the "
            f"text with --text-field."
        )


def _checked(text: object, text_field: str) -> str:
    """Returns a text as it is, or raises UserError where it is none."""
    match text:
        case str():
            # JSON can spell lone surrogates, which are no characters.
            return text.encode("utf-8", "replace").decode("utf-8")
        case bytes():
            return text.decode("utf-8", "replace")
        case _:
            raise UserError(f"the field {text_field!r} is not a text: {text!r:.40}.")


def _list_parquet(path: str) -> Iterator[Piece]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            metadata = file.metadata
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"{path!r} is not a Parquet file: {error}") from error
    for group in range(metadata.num_row_groups):
        num_bytes = metadata.row_group(group).total_byte_size
        yield Piece(
            format="parquet",
            source=path,
            start=group,
            stop=group + 1,
            num_bytes=num_bytes,
        )


def _read_parquet(piece: Piece, text_field: str) -> Iterator[str]:
    import pyarrow.parquet

    groups = range(piece.start, piece.stop)
    try:
        with pyarrow.parquet.ParquetFile(piece.source) as file:
            _check_names(file.schema_arrow.names, text_field)
            for batch in file.iter_batches(1024, groups, [text_field]):
                for text in batch.column(0).to_pylist():
                    yield _checked(text, text_field)
    except (ValueError, OSError) as error:
        raise UserError(f"{piece.source!r}, row group {piece.start}: {error}") from error


def _list_tfds(name: str, scratch: str) -> Iterator[Piece]:
    """Yields ranges of the dataset's `train` and, if it has one, `validation` split."""
    import tensorflow_datasets as tfds

    data_dir = None
    if name == STDLIB:
        from stackjax.data.corpora import stdlib

        data_dir = scratch
        stdlib.build(data_dir)
    try:
        builder: Any = tfds.builder(name, data_dir=data_dir)
        builder.as_data_source(split="train")
    except (ValueError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"input 'tfds:{name}' cannot be read: {reason} (It must have been prepared "
            f"by download_and_prepare with file_format='array_record'.)"
        ) from error
    splits = builder.info.splits
    held_out = {"train": False, "validation": True} if "validation" in splits else {}
    for split in held_out or ("train",):
        examples, num_bytes = splits[split].num_examples, splits[split].num_bytes
        for start, stop in _ranges(examples, num_bytes):
            yield Piece(
                format="tfds",
                source=name,
                start=start,
                stop=stop,
                num_bytes=num_bytes * (stop - start) // examples,
                tfds_split=split,
                held_out=held_out.get(split),
                data_dir=data_dir,
            )


def _read_tfds(piece: Piece, text_field: str) -> Iterator[str]:
    import tensorflow_datasets as tfds

    if piece.source == STDLIB:
        import stackjax.data.corpora.stdlib  # noqa: F401  Registers the builder.
    source: Any = tfds.data_source(
        piece.source, split=piece.tfds_split, data_dir=piece.data_dir, download=False
    )
    for index in range(piece.start, piece.stop):
        try:
            row = source[index]
            _check_names(row, text_field)
            yield _checked(row[text_field], text_field)
        except ValueError as error:
            raise UserError(f"'tfds:{piece.source}', {index}: {error}") from error
