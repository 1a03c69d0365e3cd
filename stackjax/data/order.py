"""The order of the data: a pure function from an example's number to a sequence of a source.

A run reads examples 0, 1, 2, ... A segment is a range of examples with one sequence length and
one mixture; consecutive stages with equal lengths and mixtures share a segment. A source is cut
into chunks with the length of the run's longest sequence, and the seed shuffles the chunks of a
source anew in each epoch. If sequences are shorter, `LANES` chunks are open at the same time:
the first piece of each is read, then the second of each, and so on. A new length begins with
the next unopened chunk, so within an epoch nothing is read twice.

Shapes: K examples, S sources.
"""

import bisect
import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import grain
import numpy as np

from stackjax.data.mixture import (
    BLOCK,
    Mixture,
    block_sources,
    examples_before,
    random_bits,
)

LANES = 16
"""Open chunks of a source."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Segment:
    """A range of examples with one sequence length and one mixture."""

    first_example: int
    """The range ends where the next segment begins."""
    seq_len: int
    """Tokens per example (T)."""
    mixture: Mixture


@dataclasses.dataclass(frozen=True, kw_only=True)
class Order:
    """The order of a run's data."""

    seed: int
    chunk_len: int
    """Tokens per chunk, a multiple of every segment's `seq_len`."""
    num_chunks: tuple[int, ...]
    """Complete chunks in each source."""
    segments: tuple[Segment, ...]
    """In order; the first begins with example 0."""


class Places(NamedTuple):
    """Where examples come from, int64 [K] each."""

    sources: np.ndarray
    """Index of the source."""
    sequences: np.ndarray
    """Index among the source's sequences of the segment's length."""


def find(order: Order, examples_K: np.ndarray) -> Places:
    """Returns where some examples of one segment come from."""
    at = _segment_at(order, int(examples_K[0]))
    offsets_K = examples_K - order.segments[at].first_example
    sources_K, ranks_K = np.empty_like(offsets_K), np.empty_like(offsets_K)
    blocks_K = offsets_K // BLOCK
    for block in np.unique(blocks_K):
        is_here = blocks_K == block
        sources, ranks = _block(order, at, int(block))
        rows = offsets_K[is_here] % BLOCK
        sources_K[is_here], ranks_K[is_here] = sources[rows], ranks[rows]
    sequences = [
        _sequence(order, at, int(source), int(rank))
        for source, rank in zip(sources_K, ranks_K, strict=True)
    ]
    return Places(sources_K, np.array(sequences, np.int64))


def length_at(order: Order, example: int) -> int:
    """Returns the tokens in an example."""
    return order.segments[_segment_at(order, example)].seq_len


def tokens_read(order: Order, example: int) -> np.ndarray:
    """Returns the tokens read from each source before an example, int64 [S]."""
    total_S = np.zeros(len(order.num_chunks), np.int64)
    for at, segment in enumerate(order.segments):
        stop = min(example, _end(order, at, example))
        if stop > segment.first_example:
            total_S += segment.seq_len * _drawn(order, at, stop - segment.first_example)
    return total_S


def epochs_read(order: Order, example: int) -> np.ndarray:
    """Returns how often each source was read before an example, float64 [S]."""
    return tokens_read(order, example) / (np.array(order.num_chunks) * order.chunk_len)


def join_segments(segments: Sequence[Segment]) -> tuple[Segment, ...]:
    """Returns the segments, without those that only continue the one before or are empty."""
    joined: list[Segment] = []
    for segment in segments:
        if joined and joined[-1].first_example == segment.first_example:
            joined.pop()
        if not joined or not _continues(joined[-1], segment):
            joined.append(segment)
    return tuple(joined)


def _continues(before: Segment, segment: Segment) -> bool:
    return dataclasses.replace(segment, first_example=before.first_example) == before


def _segment_at(order: Order, example: int) -> int:
    firsts = [segment.first_example for segment in order.segments]
    return bisect.bisect_right(firsts, example) - 1


def _end(order: Order, at: int, default: int) -> int:
    """Returns the example after a segment; the last segment has no end."""
    following = order.segments[at + 1 :]
    return following[0].first_example if following else default


@functools.lru_cache(64)
def _block(order: Order, at: int, block: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns source and rank of each example in a block, [BLOCK] each.

    An example's rank is its number among the segment's examples from the source.
    """
    segment = order.segments[at]
    sources = _sources(order, at, block)
    before_S = examples_before(segment.mixture, segment.seq_len, block)
    ranks = np.empty(BLOCK, np.int64)
    for source, before in enumerate(before_S):
        is_here = sources == source
        ranks[is_here] = before + np.arange(np.count_nonzero(is_here))
    return sources, ranks


def _sources(order: Order, at: int, block: int) -> np.ndarray:
    segment = order.segments[at]
    return block_sources(segment.mixture, segment.seq_len, order.seed, block)


@functools.lru_cache(64)
def _drawn(order: Order, at: int, num_examples: int) -> np.ndarray:
    """Returns how many of a segment's first examples come from each source, [S]."""
    segment, (block, rest) = order.segments[at], divmod(num_examples, BLOCK)
    before_S = examples_before(segment.mixture, segment.seq_len, block)
    in_block = _sources(order, at, block)[:rest]
    return before_S + np.bincount(in_block, minlength=len(before_S))


@functools.lru_cache(64)
def _opened(order: Order, at: int) -> tuple[int, ...]:
    """Returns the number of chunks of each source opened before a segment, in all epochs."""
    if at == 0:
        return (0,) * len(order.num_chunks)
    before, segment = order.segments[at - 1 : at + 1]
    drawn_S = _drawn(order, at - 1, segment.first_example - before.first_example)
    pieces = order.chunk_len // before.seq_len
    sources = zip(_opened(order, at - 1), drawn_S, order.num_chunks, strict=True)
    return tuple(
        _first_unopened(int(drawn), first, num_chunks, pieces)
        for first, drawn, num_chunks in sources
    )


def _first_unopened(drawn: int, first: int, num_chunks: int, pieces: int) -> int:
    """Returns the next chunk after `drawn` sequences from the chunk `first` on."""
    ranks = range(max(0, drawn - LANES), drawn)
    return max(
        (_chunk(rank, first, num_chunks, pieces)[0] + 1 for rank in ranks), default=first
    )


def _sequence(order: Order, at: int, source: int, rank: int) -> int:
    """Returns the index of the sequence with a rank in a segment."""
    pieces = order.chunk_len // order.segments[at].seq_len
    num_chunks = order.num_chunks[source]
    chunk, piece = _chunk(rank, _opened(order, at)[source], num_chunks, pieces)
    shuffled: Any = _shuffled(order.seed, source, num_chunks)[chunk]
    return int(shuffled) * pieces + piece


def _chunk(rank: int, first: int, num_chunks: int, pieces: int) -> tuple[int, int]:
    """Returns a sequence's chunk, counted over all epochs in shuffled order, and its piece.

    Args:
      first: The chunk with which the segment begins.
    """
    # The first epoch of the segment may begin in the middle.
    epoch_left = num_chunks - first % num_chunks
    if rank >= epoch_left * pieces:
        epochs, rank = divmod(rank - epoch_left * pieces, num_chunks * pieces)
        first, epoch_left = first + epoch_left + epochs * num_chunks, num_chunks
    group, within = divmod(rank, LANES * pieces)
    lanes = min(LANES, epoch_left - group * LANES)
    piece, lane = divmod(within, lanes)
    return first + group * LANES + lane, piece


@functools.lru_cache(64)
def _shuffled(seed: int, source: int, num_chunks: int) -> grain.MapDataset:
    """Returns the shuffled chunks of a source; an index beyond them is in a later epoch."""
    if source:
        seed = int(random_bits(seed, 0, np.array([source]))[0] >> np.uint64(32))
    return grain.MapDataset.range(num_chunks).seed(seed).shuffle()
