"""The metrics rows of a run, `metrics.jsonl`: append, truncate on resume, check and read."""

import contextlib
import dataclasses
import hashlib
import os
from collections.abc import Mapping
from typing import Any

from etils import epath

from stackjax.files.json_file import parse_object
from stackjax.files.storage import is_remote, sync_directory
from stackjax.runtime.errors import UserError

NAME = "metrics.jsonl"
AXES = ("kind", "phase", "stage", "step", "tokens")
"""The fields of every row: `kind` is a text, the others are integers."""

TEXT = ("kind", "reason", "change", "growth")
"""The fields that hold text."""
_WAY_OUT = (
    "restore the file from a backup, or resume from a checkpoint before the damage with "
    "--resume-from STEP"
)


@dataclasses.dataclass(frozen=True)
class Extent:
    """The length and hash of a run's rows up to some point: a prefix of the file."""

    num_bytes: int = 0
    sha256: str = hashlib.sha256().hexdigest()


NO_ROWS = Extent()


class RowsFile:
    """An open `metrics.jsonl`; other processes may read the file at any time.

    On a disk rows are appended. In a bucket every write replaces the whole object.

    Args:
      directory: The run directory.
      extent: The rows to keep; later rows are truncated.

    Raises:
      UserError: The file does not begin with these rows.
    """

    def __init__(self, directory: epath.PathLike, extent: Extent):
        self._path = epath.Path(directory) / NAME
        kept = _read_extent(self._path, extent)
        self._hash, self._num_bytes = hashlib.sha256(kept), extent.num_bytes
        self._object: bytes | None = kept if is_remote(self._path) else None
        if self._object is None:
            with open(self._path, "ab") as file:
                file.truncate(extent.num_bytes)
                os.fsync(file.fileno())
            sync_directory(self._path.parent)
        else:
            self._path.write_bytes(kept)

    @property
    def extent(self) -> Extent:
        """The extent of all rows in the file."""
        return Extent(self._num_bytes, self._hash.hexdigest())

    def append(self, lines: bytes, *, is_durable: bool) -> None:
        """Appends all lines, or none.

        Args:
          is_durable: Whether to sync the file to disk before returning.
        """
        if self._object is None:
            self._append_on_disk(lines, is_durable)
        elif lines:
            self._path.write_bytes(self._object + lines)
            self._object += lines
        self._hash.update(lines)
        self._num_bytes += len(lines)

    def _append_on_disk(self, lines: bytes, is_durable: bool) -> None:
        with open(self._path, "r+b", buffering=0) as file:
            file.seek(self._num_bytes)
            try:
                written = file.write(lines)
                if written != len(lines):
                    raise OSError(f"{self._path}: only {written} of {len(lines)} bytes fit")
                if is_durable:
                    os.fsync(file.fileno())
            except OSError:
                with contextlib.suppress(OSError):
                    file.truncate(self._num_bytes)
                raise


def check_rows(directory: epath.PathLike, extent: Extent) -> None:
    """Raises UserError if a run's metrics file does not begin with the rows of an extent."""
    _read_extent(epath.Path(directory) / NAME, extent)


def _read_extent(path: epath.Path, extent: Extent) -> bytes:
    """Returns the bytes of an extent; UserError if bytes are missing or changed."""
    try:
        data = path.read_bytes() if path.exists() else b""
    except IsADirectoryError as error:
        raise UserError(f"{path} is a directory; {_WAY_OUT}.") from error
    kept = data[: extent.num_bytes]
    if len(kept) < extent.num_bytes:
        raise UserError(
            f"{path} has {len(kept):,} bytes, but had {extent.num_bytes:,} when the checkpoint "
            f"was saved, so rows are missing; {_WAY_OUT}."
        )
    if hashlib.sha256(kept).hexdigest() != extent.sha256:
        raise UserError(
            f"{path} is damaged: its first {extent.num_bytes:,} bytes have changed since the "
            f"checkpoint was saved; {_WAY_OUT}."
        )
    return kept


def read_rows(
    directory: epath.PathLike, needs: Mapping[str, tuple[str, ...]] | None = None
) -> list[dict[str, Any]]:
    """Returns the rows of `metrics.jsonl` in a run directory; no rows without a file.

    An incomplete last line is ignored: the writer was killed or is still writing.

    Args:
      needs: The required numeric fields for each kind of row.

    Raises:
      UserError: A line is damaged.
    """
    path = epath.Path(directory) / NAME
    try:
        *lines, last = path.read_bytes().split(b"\n") if path.exists() else [b""]
    except IsADirectoryError as error:
        raise UserError(f"{path} is a directory; {_WAY_OUT}.") from error
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(_row(line, needs or {}))
            _check_order(rows)
        except UserError as error:
            message = f"{path} is damaged at line {number}: {error}; {_WAY_OUT}."
            raise UserError(message) from error
    with contextlib.suppress(UserError):
        rows.append(_row(last, {}))
    return rows


def _row(line: bytes, needs: Mapping[str, tuple[str, ...]]) -> dict[str, Any]:
    """Returns the row in a line; UserError for an invalid row."""
    row = parse_object(line)
    if missing := [name for name in AXES if name not in row]:
        raise UserError(f"{missing[0]} is missing")
    for name, value in row.items():
        is_list = isinstance(value, list) and name not in (*AXES, *TEXT)
        if not all(_may_hold(name, item) for item in (value if is_list else [value])):
            raise UserError(f"{name} is {str(value)[:60]!r}")
    for name in needs.get(row["kind"], ()):
        if not isinstance(row.get(name), int | float):
            raise UserError(f"{name} in a row of kind {row['kind']} is not a number")
    return row


def _may_hold(name: str, value: Any) -> bool:
    if name in TEXT:
        return isinstance(value, str)
    if name in AXES:
        return type(value) is int and value >= 0
    return value is None or isinstance(value, int | float)


def _check_order(rows: list[dict[str, Any]]) -> None:
    """Raises UserError if the last row repeats or precedes the row before."""
    if len(rows) < 2:
        return
    before, last = rows[-2:]
    if (last["phase"], last["tokens"]) < (before["phase"], before["tokens"]):
        raise UserError("it belongs before the line above")
    if all(last[name] == before[name] for name in AXES):
        raise UserError("it repeats the line above")
