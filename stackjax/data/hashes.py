"""Document hashes: sorted files of 8 bytes per document, merged and compared in blocks.

A file has different hashes in increasing order, as little-endian uint64. Hashes are uniform, so
equal ranges of values are blocks of about the same size.
"""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

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
    different = np.unique(np.asarray(hashes, DTYPE))
    different.tofile(path)
    return len(different)


def merge_hashes(paths: Sequence[Path], target: Path) -> int:
    """Writes the union of files, and returns the number of hashes."""
    count = 0
    with open(target, "wb") as file:
        for block in _blocks([_open(path) for path in paths]):
            hashes = np.unique(np.concatenate(block))
            file.write(hashes.tobytes())
            count += len(hashes)
    return count


def count_shared(first: Path, second: Path) -> int:
    """Returns the number of hashes in both files."""
    return sum(
        len(np.intersect1d(*block, assume_unique=True))
        for block in _blocks([_open(first), _open(second)])
    )


def side_file(path: Path) -> SideFile:
    """Returns the manifest entry of a file."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return SideFile(file=path.name, bytes=path.stat().st_size, sha256=digest)


def _open(path: Path) -> np.ndarray:
    # An empty file cannot be mapped.
    return np.memmap(path, DTYPE, "r") if path.stat().st_size else np.empty(0, DTYPE)


def _blocks(files: list[np.ndarray]) -> Iterator[list[np.ndarray]]:
    """Yields the part of each file in a range of values, for all ranges in order."""
    num_blocks = -(-sum(map(len, files)) // BLOCK)
    starts = [0] * len(files)
    for i in range(1, num_blocks + 1):
        top = np.uint64(i * 2**64 // num_blocks - 1)
        stops = [int(np.searchsorted(file, top, side="right")) for file in files]
        spans = zip(files, starts, stops, strict=True)
        yield [np.asarray(file[start:stop]) for file, start, stop in spans]
        starts = stops
