"""Documents by length, in flat memory.

Shapes: B buckets, N documents.
"""

import dataclasses
import functools
import itertools
import operator
from collections.abc import Sequence
from concurrent import futures
from typing import NamedTuple

import numpy as np
from etils import epath

from stackjax.data.lengths import read_lengths
from stackjax.data.manifest import Shard, Split, again
from stackjax.data.sources import CHECKS_AT_A_TIME

_BITS = 10
_SHIFT = 52 - _BITS
_FIRST = 1022 << _BITS
"""The leading bits of the float 0.5."""
NUM_BUCKETS = 33 << _BITS
"""Buckets for lengths from 1 to 2**32 - 1: exact up to 1024, then to 0.1 %."""


class Bin(NamedTuple):
    """Documents with a range of lengths."""

    longer_than: int
    up_to: int
    documents: int
    tokens: int


@dataclasses.dataclass(frozen=True)
class LengthCounts:
    """Documents and tokens by document length."""

    documents_B: np.ndarray
    """int64: documents in each bucket."""
    tokens_B: np.ndarray
    """int64: tokens of these documents."""
    longest: int
    """Length of the longest document; 0 without documents."""

    def __add__(self, other: "LengthCounts") -> "LengthCounts":
        return LengthCounts(
            self.documents_B + other.documents_B,
            self.tokens_B + other.tokens_B,
            max(self.longest, other.longest),
        )

    @property
    def documents(self) -> int:
        """Number of documents."""
        return int(self.documents_B.sum())

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return int(self.tokens_B.sum())

    @property
    def mean(self) -> float:
        """Mean length of at least one document."""
        return self.tokens / self.documents

    @property
    def median(self) -> float:
        """Median length of at least one document, to 0.1 %."""
        below_B, middle = np.cumsum(self.documents_B), self.documents // 2
        ranks = [middle + 1] if self.documents % 2 else [middle, middle + 1]
        buckets = np.searchsorted(below_B, ranks)
        return float(np.mean(self.tokens_B[buckets] / self.documents_B[buckets]))

    def up_to(self, length: int) -> tuple[int, int]:
        """Returns the documents with at most `length` tokens, and their tokens.

        Args:
          length: At most 2**32; above 1024, powers of two are exact, and others to 0.1 %.
        """
        stop = max(0, int(_buckets(np.array([float(length)]))[0]))
        return int(self.documents_B[:stop].sum()), int(self.tokens_B[:stop].sum())

    def octaves(self) -> list[Bin]:
        """Returns the histogram over powers of two, without empty bins at both ends."""
        edges = [0, *(2**power for power in range(33))]
        below = [self.up_to(edge) for edge in edges]
        bins = [
            Bin(low, high, after[0] - before[0], after[1] - before[1])
            for (low, high), (before, after) in zip(
                itertools.pairwise(edges), itertools.pairwise(below), strict=True
            )
        ]
        filled = [at for at, each in enumerate(bins) if each.documents]
        return bins[filled[0] : filled[-1] + 1] if filled else []


def count_lengths(lengths_N: np.ndarray) -> LengthCounts:
    """Returns the counts of documents with these positive lengths."""
    # A document of 2**k tokens is the last one below the edge of a bucket, not the first above.
    buckets_N = _buckets(lengths_N - 0.5)
    documents_B = np.bincount(buckets_N, minlength=NUM_BUCKETS)
    tokens_B = np.bincount(buckets_N, lengths_N, minlength=NUM_BUCKETS)
    longest = int(lengths_N.max(initial=0))
    return LengthCounts(documents_B, tokens_B.astype(np.int64), longest)


def split_lengths(path: str, split: Split) -> LengthCounts:
    """Returns the counts over all documents of a split.

    Raises:
      UserError: The document lengths are damaged.
      FileNotFoundError: A file is missing.
    """

    def read(shard: Shard) -> LengthCounts:
        file = epath.Path(path) / shard.lengths.file
        return count_lengths(read_lengths(file, shard, again(path)))

    def add(shards: Sequence[Shard]) -> LengthCounts:
        empty = count_lengths(np.empty(0, np.uint32))
        return functools.reduce(operator.add, map(read, shards), empty)

    # A few counts per thread are in memory at a time, not a few per shard.
    with futures.ThreadPoolExecutor(CHECKS_AT_A_TIME) as pool:
        parts = (split.shards[first::CHECKS_AT_A_TIME] for first in range(CHECKS_AT_A_TIME))
        return functools.reduce(operator.add, pool.map(add, parts))


def _buckets(values_N: np.ndarray) -> np.ndarray:
    """Returns the bucket of each float64: exponent and leading bits of the fraction."""
    return (values_N.view(np.int64) >> _SHIFT) - _FIRST
