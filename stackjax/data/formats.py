"""Formats of input files, by suffix."""

import re
from pathlib import PurePosixPath
from typing import Literal

from stackjax.runtime.errors import UserError

FileFormat = Literal["text", "JSON lines", "Parquet", "tokens", "tar"]

_PATTERNS: dict[FileFormat, str] = {
    "JSON lines": r"\.(jsonl|ndjson|jsonlines|json)(\.(gz|gzip|zst|zstd))?$",
    "Parquet": r"\.(parquet|pq)$",
    "tokens": r"\.(bin|idx)$",
    "tar": r"\.(tgz|tar(\.(gz|gzip|zst|zstd))?)$",
}
_COMPRESSED = re.compile(r"\.(gz|gzip|zst|zstd|tgz)$", re.IGNORECASE)
_ROWS = {".jsonl", ".ndjson", ".jsonlines", ".json", ".parquet", ".pq"}
_NO_TEXT = {
    *(".csv", ".tsv", ".xls", ".xlsx", ".arrow", ".feather", ".avro", ".orc"),
    *(".tfrecord", ".array_record", ".npy", ".npz", ".pkl", ".h5", ".hdf5", ".db", ".sqlite"),
    *(".gz", ".gzip", ".zst", ".zstd", ".bz2", ".xz", ".lzma", ".lz4", ".br"),
    *(".zip", ".7z", ".rar", ".pdf", ".doc", ".docx", ".odt"),
}


def format_of(path: str) -> FileFormat:
    """Returns a file's format; upper and lower case are the same.

    Raises:
      UserError: The suffix is of an unsupported format.
    """
    for kind, pattern in _PATTERNS.items():
        if re.search(pattern, path, re.IGNORECASE):
            return kind
    *inner, last = ["", *(suffix.lower() for suffix in PurePosixPath(path).suffixes)]
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
    return "text"


def is_compressed(path: str) -> bool:
    """Returns whether a file with a known format is compressed."""
    return _COMPRESSED.search(path) is not None
