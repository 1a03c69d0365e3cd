"""Parts: `prepare` splits the inputs into parts, and writes a shard per part and split."""

import dataclasses
import itertools
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from stackjax.data.piece import Piece
from stackjax.runtime.progress_bar import progress_bar

PART_BYTES = 2**24
MAX_PARTS = 256
SECONDS_BETWEEN_LINES = 10


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """Consecutive pieces, written by a single call in a worker process."""

    index: int
    """Position in the stream."""
    pieces: tuple[Piece, ...]
    """The pieces, in order."""

    @property
    def num_bytes(self) -> int:
        """Approximate text size in bytes."""
        return sum(piece.num_bytes for piece in self.pieces)


def tell_listing(pieces: Iterable[Piece]) -> Iterator[Piece]:
    """Yields the pieces; prints a progress line every few seconds."""
    told = time.monotonic()
    for piece in pieces:
        yield piece
        if time.monotonic() > told + SECONDS_BETWEEN_LINES:
            told = time.monotonic()
            print(f"checking the inputs: {piece.source}", flush=True)


def group_pieces(pieces: list[Piece]) -> list[Part]:
    """Returns the pieces in at most a few hundred parts of similar size, in order."""
    size = max(PART_BYTES, sum(piece.num_bytes for piece in pieces) // MAX_PARTS)
    before = itertools.accumulate((p.num_bytes for p in pieces), initial=0)
    numbered = zip(before, pieces, strict=False)
    groups = itertools.groupby(numbered, key=lambda pair: pair[0] // size)
    return [
        Part(index=index, pieces=tuple(piece for _, piece in group))
        for index, (_, group) in enumerate(groups)
    ]


def show_progress(
    parts: list[Part], written: Iterable[tuple[int, int]]
) -> Iterator[tuple[int, int]]:
    """Yields index and written bytes of each part; shows a progress bar, or log lines."""
    total = sum(part.num_bytes for part in parts)
    with progress_bar("preparing", total, in_bytes=True, in_log=True) as advance:
        for index, num_bytes in written:
            yield index, num_bytes
            advance(parts[index].num_bytes)


def warn_if_disk_is_small(
    parts: list[Part], staging: Path, written: Iterable[tuple[int, int]]
) -> Iterator[tuple[int, int]]:
    """Yields index and written bytes of each part; warns once if the disk is too small."""
    total, read, wrote, is_told = sum(part.num_bytes for part in parts), 0, 0, False
    for index, num_bytes in written:
        yield index, num_bytes
        read += parts[index].num_bytes
        wrote += num_bytes
        to_come = wrote * (total - read) / max(read, 1)
        free = shutil.disk_usage(staging).free
        if to_come > free and not is_told:
            is_told = True
            print(
                f"warning: about {to_come / 1e9:.1f} GB are still to be written, but the disk "
                f"of {str(staging.parent)!r} has {free / 1e9:.1f} GB left.",
                file=sys.stderr,
                flush=True,
            )
