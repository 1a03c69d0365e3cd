"""Random access to sequences of whole documents, packed by best fit.

Shapes: T tokens per sequence.
"""

import shutil
import tempfile
import weakref
from concurrent import futures
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from stackjax.data import best_fit, packing
from stackjax.data.best_fit import Plan
from stackjax.data.lengths import read_lengths
from stackjax.data.manifest import Shard
from stackjax.data.sources import CHECKS_AT_A_TIME, TokenSource

ARRAYS = ("starts", "offsets", "lengths")


class PackedSource:
    """A Grain data source over a split's documents, packed into sequences.

    Reading is thread-safe, and the source can be pickled for worker processes. A plan has at
    least 12 bytes per document, so pickles have none: all workers map the files that the first
    source has written into a temporary directory, and removes at the end.
    """

    def __init__(self, source: TokenSource):
        """Plans the sequences.

        Args:
          source: An opened split, with the sequence length.

        Raises:
          UserError: The document lengths are damaged.
          OSError: The disk with the temporary directory is full.
        """
        self.path = source.path
        self.name = source.name
        self.split = source.split
        self.seq_len = source.seq_len
        self.manifest = source.manifest
        self._source = source
        plan = best_fit.plan(_lengths(source), source.seq_len)
        self.padding_share = plan.padding_share
        """Share of places without a token."""
        self._directory = tempfile.mkdtemp(prefix="stackjax-plan-")
        weakref.finalize(self, shutil.rmtree, self._directory, ignore_errors=True)
        self._plan = _write(plan, Path(self._directory))

    def __len__(self) -> int:
        """Returns the number of sequences."""
        return len(self._plan["starts"]) - 1

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns a sequence's tokens and segments, int32 [T].

        A segment is a document, or a piece of a longer one: 0, 1, ... in stream order. Padding
        comes last: end tokens, in the segment `packing.PADDING`.

        Raises:
          OSError: A record is damaged or has tokens outside the vocabulary.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"sequence {index} is outside 0..{len(self) - 1}.")
        starts, offsets, lengths = (self._plan[name] for name in ARRAYS)
        pieces = slice(starts[index], starts[index + 1])
        tokens_T = np.full(self.seq_len, self.manifest.tokenizer.end_id, np.int32)
        segments_T = np.full(self.seq_len, packing.PADDING, np.int32)
        start = 0
        ranges = zip(offsets[pieces].tolist(), lengths[pieces].tolist(), strict=True)
        for segment, (offset, length) in enumerate(ranges):
            stop = start + length
            tokens_T[start:stop] = self._source.read(offset, length)
            segments_T[start:stop] = segment
            start = stop
        return tokens_T, segments_T

    def with_length(self, seq_len: int) -> "PackedSource":
        """Returns the same documents, packed into sequences of another length."""
        if seq_len == self.seq_len:
            return self
        return PackedSource(self._source.with_length(seq_len))

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_plan"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._plan = _map(Path(self._directory))


def _lengths(source: TokenSource) -> np.ndarray:
    """Returns the token count of each document in a split, uint32 [N]."""

    def read(shard: Shard) -> np.ndarray:
        file = epath.Path(source.path) / shard.lengths.file
        return read_lengths(file, shard, source.remedy)

    with futures.ThreadPoolExecutor(CHECKS_AT_A_TIME) as pool:
        return np.concatenate(list(pool.map(read, source.manifest.splits[source.split].shards)))


def _write(plan: Plan, directory: Path) -> dict[str, np.ndarray]:
    """Writes the arrays of a plan into a directory, and returns them, mapped into memory."""
    for name in ARRAYS:
        np.save(directory / f"{name}.npy", getattr(plan, name))
    return _map(directory)


def _map(directory: Path) -> dict[str, np.ndarray]:
    # As plain arrays: indexing a memmap takes several times as long.
    files = {name: directory / f"{name}.npy" for name in ARRAYS}
    return {name: np.asarray(np.load(file, mmap_mode="r")) for name, file in files.items()}
