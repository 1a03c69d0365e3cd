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
import itertools
from collections.abc import Sequence
from typing import NamedTuple

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

    @property
    def epoch_tokens(self) -> np.ndarray:
        """Tokens in an epoch of each source, int64 [S]."""
        return np.array(self.num_chunks) * self.chunk_len


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
    return Places(sources_K, _sequences(order, at, sources_K, ranks_K))


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
    return tokens_read(order, example) / order.epoch_tokens


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
    counts_S = np.bincount(sources, minlength=len(before_S))
    ranks = np.empty(BLOCK, np.int64)
    ranks[np.argsort(sources, kind="stable")] = np.arange(BLOCK) + np.repeat(
        before_S - np.cumsum(counts_S) + counts_S, counts_S
    )
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
def _opened(order: Order, at: int) -> np.ndarray:
    """Returns how many chunks of each source are opened before a segment, [S]."""
    first_S = np.zeros(len(order.num_chunks), np.int64)
    for index, (before, segment) in enumerate(itertools.pairwise(order.segments[: at + 1])):
        drawn_S = _drawn(order, index, segment.first_example - before.first_example)
        first_S = _first_unopened(order, before.seq_len, first_S, drawn_S)
    return first_S


def _first_unopened(
    order: Order, seq_len: int, first_S: np.ndarray, drawn_S: np.ndarray
) -> np.ndarray:
    """Returns the next chunk after `drawn` sequences from the chunk `first` on, [S]."""
    sources_S1, first_S1 = np.arange(len(first_S))[:, None], first_S[:, None]
    last_SL = drawn_S[:, None] - np.arange(1, LANES + 1)
    chunks_SL, _ = _chunks(order, seq_len, sources_S1, np.maximum(last_SL, 0), first_S1)
    return np.where(last_SL < 0, first_S1, chunks_SL + 1).max(axis=1)


def _sequences(order: Order, at: int, sources_K: np.ndarray, ranks_K: np.ndarray) -> np.ndarray:
    """Returns the indices of the sequences with some ranks in a segment, int64 [K]."""
    seq_len, first_K = order.segments[at].seq_len, _opened(order, at)[sources_K]
    chunks_K, pieces_K = _chunks(order, seq_len, sources_K, ranks_K, first_K)
    shuffled = [
        _shuffled(order.seed, source, order.num_chunks[source], chunk)
        for source, chunk in zip(sources_K.tolist(), chunks_K.tolist(), strict=True)
    ]
    return np.array(shuffled, np.int64) * (order.chunk_len // seq_len) + pieces_K


def _chunks(
    order: Order,
    seq_len: int,
    sources: np.ndarray,
    ranks: np.ndarray,
    first: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Returns chunks, counted over all epochs in shuffled order, and pieces of sequences.

    Args:
      sources: The source of each sequence.
      first: The chunk with which the segment begins in this source.
    """
    pieces = order.chunk_len // seq_len
    num_chunks = np.array(order.num_chunks)[sources]
    # The first epoch of the segment may begin in the middle.
    epoch_left = num_chunks - first % num_chunks
    epochs, in_epoch = np.divmod(ranks - epoch_left * pieces, num_chunks * pieces)
    is_later = epochs >= 0
    first = np.where(is_later, first + epoch_left + epochs * num_chunks, first)
    left = np.where(is_later, num_chunks, epoch_left)
    group, within = np.divmod(np.where(is_later, in_epoch, ranks), LANES * pieces)
    piece, lane = np.divmod(within, np.minimum(LANES, left - group * LANES))
    return first + group * LANES + lane, piece


@functools.lru_cache(2**14)  # the open chunks of 1000 sources
def _shuffled(seed: int, source: int, num_chunks: int, chunk: int) -> int:
    """Returns a chunk's place in its source; a chunk beyond them is in a later epoch."""
    epoch, index = divmod(chunk, num_chunks)
    seed = (_seed(seed, source) + epoch) % 2**32
    return grain.experimental.index_shuffle(
        index, max_index=num_chunks - 1, seed=seed, rounds=4
    )


@functools.lru_cache(2**10)
def _seed(seed: int, source: int) -> int:
    """Returns the seed of a source's shuffle: the one that Grain derives for a dataset."""
    if source:
        seed = int(random_bits(seed, 0, np.array([source]))[0] >> np.uint64(32))
    return int(np.random.SeedSequence([seed, 1]).generate_state(1)[0])
