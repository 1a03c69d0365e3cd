"""Compressed files as streams; a truncated file is an error."""

import contextlib
import io
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO, Final

import zstandard

from stackjax.data.text_field import BadRow
from stackjax.files.input_file import open_input, stamp_of

INPUT_BYTES = 2**14
"""Compressed bytes per read: few, since each may become 32 KiB."""
BUFFER_BYTES = 2**20
DAMAGED: Final = "damaged rest of a file"
# The maximum of the zstd command, `--long=31`.
_MAX_WINDOW = 2**31
_GZIP = 16 + zlib.MAX_WBITS


@contextlib.contextmanager
def opened(path: str, is_compressed: bool) -> Iterator[BinaryIO]:
    """Yields a file, decompressed if necessary."""
    with open_compressed(path) if is_compressed else open_input(path) as file:
        yield file


@contextlib.contextmanager
def open_compressed(path: str) -> Iterator[io.BufferedReader]:
    """Yields the decompressed `.gz` or `.zst` file, with all members or frames.

    Raises:
      BadRow: The file is damaged or truncated.
    """
    if stamp_of(path)[0] == 0:
        raise BadRow("the archive is truncated: it is empty; copy it again.", DAMAGED)
    is_gzip = path.lower().endswith((".gz", ".gzip", ".tgz"))
    try:
        with open_input(path) as file:
            chunks = _gzip_chunks(file) if is_gzip else _zstd_chunks(file)
            yield io.BufferedReader(_Stream(chunks), BUFFER_BYTES)
    except EOFError as error:
        raise BadRow(f"the archive is truncated: {error}; copy it again.", DAMAGED) from error
    except (zlib.error, zstandard.ZstdError) as error:
        raise BadRow(f"the archive cannot be read: {error}.", DAMAGED) from error


def _gzip_chunks(file: BinaryIO) -> Iterator[bytes]:
    """Yields the decompressed members; EOFError if the last member is truncated.

    Unlike `gzip.GzipFile`, yields all data before the damage.
    """
    member, data = None, b""
    while data := data or file.read(INPUT_BYTES):
        if member is None:
            data = data.lstrip(b"\0")  # Padding.
            if not data:
                continue
            member = zlib.decompressobj(_GZIP)
        yield member.decompress(data)
        data = member.unused_data if member.eof else b""
        member = None if member.eof else member
    if member is not None:
        raise EOFError("the file ends within a member")


def _zstd_chunks(file: BinaryIO) -> Iterator[bytes]:
    """Yields the decompressed frames; EOFError if the last frame is truncated."""
    decompressor = zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW)
    frame, data = None, b""
    while data := data or file.read(INPUT_BYTES):
        frame = frame or decompressor.decompressobj()
        yield frame.decompress(data)
        data = frame.unused_data if frame.eof else b""
        frame = None if frame.eof else frame
    if frame is not None:
        raise EOFError("the file ends within a frame")


class _Stream(io.RawIOBase):
    """A readable file over an iterator of byte chunks."""

    def __init__(self, chunks: Iterator[bytes]):
        self._chunks = chunks
        self._rest = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._rest:
            chunk = next(self._chunks, None)
            if chunk is None:
                return 0
            self._rest = memoryview(chunk)
        count = min(len(buffer), len(self._rest))
        buffer[:count] = self._rest[:count]
        self._rest = self._rest[count:]
        return count
