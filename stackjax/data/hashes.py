"""Document hashes: sorted files of 8 bytes per document, merged and compared in blocks.

A file has different hashes in increasing order, as little-endian uint64. Hashes are uniform, so
equal ranges of values are blocks of about the same size.
"""

import bisect
import contextlib
import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from stackjax.data.manifest import SideFile

BLOCK = 2**20
"""Hashes in memory at a time, over all files."""
DTYPE = np.dtype("<u8")


def hash_document(data: bytes) -> int:
    """Returns a hash below 2**64."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")


def write_hashes(path: Path, hashes: Sequence[int]) -> int:
    """Writes hashes from any order, without repeats; returns the number written."""
    different = _different(np.asarray(hashes, DTYPE))
    different.tofile(path)
    return len(different)


def _different(hashes: np.ndarray) -> np.ndarray:
    """Returns sorted hashes without repeats; several times faster than `np.unique`."""
    ordered = np.sort(hashes)
    return ordered[np.concatenate([[True], ordered[1:] != ordered[:-1]])[: len(ordered)]]


def merge_hashes(paths: Sequence[Path], target: Path) -> int:
    """Writes the union of files, and returns the number of hashes."""
    count = 0
    with open(target, "wb") as file:
        for block in _blocks(paths):
            hashes = _different(np.concatenate(block))
            file.write(hashes.tobytes())
            count += len(hashes)
    return count


def count_shared(first: Path, second: Path) -> int:
    """Returns the number of hashes in both files."""
    return sum(
        len(np.intersect1d(*block, assume_unique=True)) for block in _blocks([first, second])
    )


def side_file(path: Path) -> SideFile:
    """Returns the manifest entry of a file."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return SideFile(file=path.name, bytes=path.stat().st_size, sha256=digest)


def _blocks(paths: Sequence[Path]) -> Iterator[list[np.ndarray]]:
    """Yields the part of each file in a range of values, for all ranges in order."""
    with contextlib.ExitStack() as stack:
        # A memory map would keep the pages of all files in memory.
        files = [stack.enter_context(open(path, "rb")) for path in paths]
        sizes = [path.stat().st_size // DTYPE.itemsize for path in paths]
        num_blocks = -(-sum(sizes) // BLOCK)
        starts = [0] * len(files)
        for i in range(1, num_blocks + 1):
            top = i * 2**64 // num_blocks - 1
            spans = zip(files, starts, sizes, strict=True)
            stops = [_first_above(top, file, start, size) for file, start, size in spans]
            spans = zip(files, starts, stops, strict=True)
            yield [_read(file, start, stop) for file, start, stop in spans]
            starts = stops


def _first_above(value: int, file: BinaryIO, start: int, size: int) -> int:
    """Returns the index of the first hash above a value."""
    return bisect.bisect_right(
        range(size), value, lo=start, key=lambda index: int(_read(file, index, index + 1)[0])
    )


def _read(file: BinaryIO, start: int, stop: int) -> np.ndarray:
    """Returns the hashes from `start` to `stop`."""
    size = DTYPE.itemsize
    return np.frombuffer(os.pread(file.fileno(), size * (stop - start), size * start), DTYPE)
