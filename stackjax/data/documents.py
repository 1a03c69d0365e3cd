"""Documents from the inputs to `prepare`, split into pieces for worker processes.

The suffix of a file, in upper or lower case, determines the format: JSON lines (`.jsonl`,
`.ndjson`, `.jsonlines` or `.json`, also with `.gz` or `.zst`), Parquet (`.parquet` or `.pq`),
or else plain text. Suffixes such as `.csv` or `.zip` are errors.
"""

import dataclasses
import glob
import os
import re
import stat
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path

from stackjax.data.json_lines import check_first_line, read_json_lines
from stackjax.data.parquet import list_parquet, read_parquet
from stackjax.data.piece import Piece, cut
from stackjax.data.text_field import BadRow, LeftOut, Reading, leave_out
from stackjax.data.tfds_examples import list_tfds, read_tfds
from stackjax.files.storage import is_remote
from stackjax.runtime.errors import UserError

FILES_AT_A_TIME = 16

_JSON = re.compile(r"\.(jsonl|ndjson|jsonlines|json)(\.(?:gz|gzip|zst|zstd))?$", re.IGNORECASE)
_PARQUET = re.compile(r"\.(parquet|pq)$", re.IGNORECASE)
_ROWS = {".jsonl", ".ndjson", ".jsonlines", ".json", ".parquet", ".pq"}
_NO_TEXT = {
    *(".csv", ".tsv", ".xls", ".xlsx", ".arrow", ".feather", ".avro", ".orc"),
    *(".tfrecord", ".array_record", ".npy", ".npz", ".pkl", ".h5", ".hdf5", ".db", ".sqlite"),
    *(".gz", ".gzip", ".zst", ".zstd", ".bz2", ".xz", ".lzma", ".lz4", ".br"),
    *(".zip", ".tar", ".tgz", ".7z", ".rar", ".pdf", ".doc", ".docx", ".odt"),
}


def list_pieces(inputs: tuple[str, ...], scratch: str, reading: Reading) -> Iterator[Piece]:
    """Yields the pieces of all inputs, in an order that depends only on the inputs.

    Checks the schema of every Parquet file and the first line of every JSON file.

    Args:
      scratch: Directory for the built-in corpus.

    Raises:
      UserError: An input is unreadable or given twice; the message names the file.
    """
    first: dict[str, str] = {}
    for name in inputs:
        paths = [name] if name.startswith("tfds:") else _expand(name)
        _check_named_once(name, paths, first)
        if name.startswith("tfds:"):
            yield from list_tfds(name.removeprefix("tfds:"), scratch, reading)
            continue

        def list_file(path: str) -> list[Piece]:
            return _list_file(path, reading)

        # Network disks have a high latency, but serve many requests at the same time.
        with futures.ThreadPoolExecutor(FILES_AT_A_TIME) as pool:
            for pieces in pool.map(list_file, paths):
                yield from pieces


def read_documents(piece: Piece, reading: Reading) -> Iterator[str | LeftOut]:
    """Yields the documents in a piece, and the skipped rows.

    Raises:
      UserError: A document is refused; the message names file and row.
    """
    _check_unchanged(piece)
    match piece.format:
        case "text":
            yield _read_text(piece.source, reading)
        case "jsonl" | "compressed_jsonl":
            yield from read_json_lines(piece, reading)
        case "parquet":
            yield from read_parquet(piece, reading)
        case "tfds":
            yield from read_tfds(piece, reading)
    _check_unchanged(piece)


def _expand(name: str) -> list[str]:
    """Returns the sorted files of an input."""
    if is_remote(name):
        raise UserError(f"input {name!r} is in a bucket; mount it, or copy it to a disk.")
    if os.path.isdir(name):
        raise UserError(
            f"input {name!r} is a directory; name its files, such as '{name}/**/*.txt'."
        )
    if os.path.lexists(name):
        return [name]
    found = glob.glob(name, recursive=True)
    # `**/**` finds a file several times.
    paths = sorted({path for path in found if not os.path.isdir(path)})
    if not paths:
        raise UserError(f"input {name!r} matches no file.")
    return paths


def _check_named_once(name: str, paths: list[str], first: dict[str, str]) -> None:
    """Raises UserError if a path also belongs to an earlier input.

    Args:
      first: From path to input, for all earlier inputs; this function adds `paths`.
    """
    for path in paths:
        place = os.path.abspath(path)
        if place in first:
            raise UserError(
                f"input {name!r} names {path!r}, which input {first[place]!r} names too; it "
                f"would be read twice, so leave one of them out."
            )
        first[place] = name


def _list_file(path: str, reading: Reading) -> list[Piece]:
    """Returns the pieces in a file, after all quick checks."""
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"input {path!r} is a device, pipe or socket; name a regular file.")
    if _PARQUET.search(path):
        pieces = list(list_parquet(path, status.st_size, reading))
    elif match := _JSON.search(path):
        is_compressed = match[2] is not None
        check_first_line(path, is_compressed, reading)
        pieces = _cut_json(path, status.st_size, is_compressed)
    else:
        _check_ending(path)
        pieces = [Piece(format="text", source=path, num_bytes=status.st_size)]
    stamp = (status.st_size, status.st_mtime_ns)
    return [dataclasses.replace(piece, stamp=stamp) for piece in pieces]


def _cut_json(path: str, size: int, is_compressed: bool) -> list[Piece]:
    if is_compressed:
        return [Piece(format="compressed_jsonl", source=path, num_bytes=size)]
    return [
        Piece(format="jsonl", source=path, start=start, stop=stop, num_bytes=stop - start)
        for start, stop in cut(size, size)
    ]


def _check_ending(path: str) -> None:
    """Raises UserError if a file's suffix does not mean plain text."""
    *inner, last = ["", *(suffix.lower() for suffix in Path(path).suffixes)]
    if last in _NO_TEXT:
        raise UserError(
            f"{path!r} ends in {last}, an unsupported format; convert it to JSON lines "
            f"(.jsonl, .jsonl.gz, .jsonl.zst), Parquet or plain text, or leave it out."
        )
    if rows := _ROWS.intersection(inner):
        raise UserError(
            f"{path!r} contains {rows.pop()} but ends in {last}; rename it, so that its name "
            f"has the suffix of its format alone."
        )


def _read_text(path: str, reading: Reading) -> str | LeftOut:
    with open(path, "rb") as file:
        data = file.read()
    try:
        return _decode(data)
    except BadRow as error:
        return leave_out(error, reading, lambda: f"{path!r}")


def _decode(data: bytes) -> str:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        message = f"this file is not UTF-8 text: {error}; {_CONVERT}."
        raise BadRow(message, "not UTF-8") from error
    if "\0" in text:
        message = f"this file is not text: byte {data.index(bytes(1))} is NUL; {_CONVERT}."
        raise BadRow(message, "not text")
    return text


_CONVERT = "convert it with iconv if it is text in another encoding, or leave it out"


def _check_unchanged(piece: Piece) -> None:
    if piece.stamp is not None:
        status = os.stat(piece.source)
        if (status.st_size, status.st_mtime_ns) != piece.stamp:
            raise UserError(f"{piece.source!r} has changed while being read; start again.")
