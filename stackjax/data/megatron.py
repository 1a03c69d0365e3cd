"""Token files of Megatron-LM: tokens in `NAME.bin`, documents in `NAME.idx`.

The index has a magic number, a version, a dtype code, the numbers S of sequences and D of
document bounds, S lengths (int32), S byte offsets (int64) and D bounds (int64): document d has
the sequences from bound d to bound d + 1.
"""

import dataclasses
import itertools
import struct
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np

from stackjax.data.piece import Piece, cut
from stackjax.data.text_field import NO_TOKENS, LeftOut
from stackjax.data.token_documents import TokenRules, check_vocabulary, split_documents
from stackjax.files.input_file import open_input
from stackjax.runtime.errors import UserError

_HEADER = struct.Struct("<9sQBQQ")
_MAGIC = b"MMIDIDX\0\0"
_DTYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}


@dataclasses.dataclass(frozen=True)
class Index:
    """The header of an index."""

    dtype: np.dtype
    sequences: int
    """S."""
    bounds: int
    """D."""


def index_of(path: str) -> str:
    """Returns the path of the index beside a `.bin` file."""
    return f"{path[:-4]}.idx"


def list_megatron(path: str, size: int, index_size: int, rules: TokenRules) -> Iterator[Piece]:
    """Yields the pieces of a file, each with a range of documents.

    Raises:
      UserError: The files are damaged, or do not belong together.
    """
    name = index_of(path)
    with open_input(name) as file:
        index = _read_header(file, name)
        expected = _HEADER.size + 12 * index.sequences + 8 * index.bounds
        if index_size != expected:
            raise UserError(
                f"{name!r} is damaged or has more than tokens: it has {index_size} bytes, not "
                f"{expected} as its header announces; copy it again."
            )
        lengths, offsets = _read_sequences(file, index, max(index.sequences - 1, 0), 1)
    stop = int(sum(offsets) + sum(lengths) * index.dtype.itemsize)
    if stop != size:
        raise UserError(
            f"{path!r} has {size} bytes, but {name!r} needs {stop}; copy both again."
        )
    for first, last in cut(index.bounds - 1, size):
        num_bytes = size * (last - first) // (index.bounds - 1)
        yield Piece(format="megatron", source=path, start=first, stop=last, num_bytes=num_bytes)


def read_megatron(piece: Piece, rules: TokenRules) -> Iterator[np.ndarray | LeftOut]:
    """Yields the documents in a piece, [T], and those without tokens."""
    name = index_of(piece.source)
    with open_input(name) as file:
        index = _read_header(file, name)
        bounds = _read_bounds(file, index, piece.start, piece.stop - piece.start + 1)
        if (np.diff(bounds) < 0).any() or not 0 <= bounds[0] <= bounds[-1] <= index.sequences:
            raise UserError(f"{name!r} is damaged: its documents have no order; copy it again.")
        lengths, offsets = _read_sequences(file, index, bounds[0], bounds[-1] - bounds[0])
    bounds = bounds - bounds[0]
    with open_input(piece.source) as file:
        for start, stop in itertools.pairwise(bounds):
            spans = zip(offsets[start:stop], lengths[start:stop], strict=True)
            parts = [_read(file, index.dtype, int(at), int(count)) for at, count in spans]
            tokens = np.concatenate([np.empty(0, index.dtype), *parts])
            check_vocabulary(tokens, rules, piece.source)
            documents = list(split_documents(tokens, rules))
            yield from documents or [LeftOut(NO_TOKENS)]


def _read_header(file: BinaryIO, name: str) -> Index:
    data = file.read(_HEADER.size)
    if len(data) < _HEADER.size or not data.startswith(_MAGIC):
        raise UserError(f"{name!r} is not an index of Megatron-LM; leave it out.")
    _, version, code, sequences, bounds = _HEADER.unpack(data)
    if version != 1 or code not in _DTYPES:
        raise UserError(
            f"{name!r} has version {version} and dtype code {code}; only version 1 with "
            f"integer tokens is supported."
        )
    if not sequences or bounds < 2:
        raise UserError(f"{name!r} has no documents; leave it out.")
    return Index(np.dtype(_DTYPES[code]), sequences, bounds)


def _read_sequences(
    file: BinaryIO, index: Index, start: int, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns lengths and byte offsets of sequences."""
    at = _HEADER.size
    lengths = _read(file, np.dtype("<i4"), at + 4 * int(start), int(count))
    at += 4 * index.sequences
    return lengths, _read(file, np.dtype("<i8"), at + 8 * int(start), int(count))


def _read_bounds(file: BinaryIO, index: Index, start: int, count: int) -> np.ndarray:
    at = _HEADER.size + 12 * index.sequences
    return _read(file, np.dtype("<i8"), at + 8 * start, count)


def _read(file: BinaryIO, dtype: np.dtype, offset: int, count: int) -> np.ndarray:
    """Returns an array from a file; UserError if the file ends before."""
    file.seek(offset)
    data = file.read(count * dtype.itemsize)
    if count < 0 or len(data) != count * dtype.itemsize:
        raise UserError(f"an index names {count} tokens at byte {offset}, which are not there.")
    return np.frombuffer(data, dtype)
