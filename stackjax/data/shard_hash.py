"""Shard hashes: over all records, and over the first and last record."""

import hashlib
from pathlib import Path

from array_record.python.array_record_module import ArrayRecordReader

RECORDS_AT_A_TIME = 256


class ShardHash:
    """A running hash; memory holds only the first and last record."""

    def __init__(self):
        self._all = hashlib.sha256()
        self._first: bytes | None = None
        self._last = b""

    def update(self, record: bytes) -> None:
        """Adds the next record."""
        self._all.update(record)
        self._first = record if self._first is None else self._first
        self._last = record

    def digest(self) -> str:
        """Returns the hash over all tokens; record borders have no effect."""
        return self._all.hexdigest()

    def ends_digest(self) -> str:
        """Returns the hash over the first and the last record."""
        return hash_ends(self._first or b"", self._last)


def hash_ends(first: bytes, last: bytes) -> str:
    """Returns the hash over the first and the last record."""
    return hashlib.sha256(first + last).hexdigest()


def hash_file(path: Path) -> str:
    """Returns the hash over all tokens in a file.

    Raises:
      OSError: A record is damaged.
    """
    reader, found = ArrayRecordReader(str(path)), ShardHash()
    records = reader.num_records()
    try:
        for start in range(0, records, RECORDS_AT_A_TIME):
            stop = min(start + RECORDS_AT_A_TIME, records)
            for record in reader.read(range(start, stop)):
                found.update(record)
    except RuntimeError as error:  # From ArrayRecord, for damaged records.
        raise OSError(f"{str(path)!r} is damaged: {error}") from error
    return found.digest()
