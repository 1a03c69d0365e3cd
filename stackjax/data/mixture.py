"""Mixtures: which source each example of a run comes from.

An example's source is a pure function of the seed, the example's position and the weights. Each
block of `BLOCK` examples has the sources' shares to within one example, in a random order. The
remainders even out over blocks: block b of a mixture takes the points i + v(b), where v is the
van der Corput sequence, and a source has the points in its part of the range.

Shapes: S sources, N blocks.
"""

import dataclasses
import functools

import numpy as np

BLOCK = 4096
"""Examples in a block; shares are constant within a block."""
_BITS = 28
"""Bits of a point's fraction, and at most of a block's number."""
_SPAN = 1024
"""Blocks of a ramp that are summed together."""
_SWAPS = ((1, 0x55555555), (2, 0x33333333), (4, 0x0F0F0F0F), (8, 0x00FF00FF), (16, 0x0000FFFF))
"""Neighbors of 1, 2, ... bits that trade places, and masks of the lower ones, in 32 bits."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mixture:
    """Weights per source, or a ramp between two mixtures."""

    weights: tuple[float, ...]
    """Relative weight of each source, after the ramp."""
    ramp_from: tuple[float, ...] | None = None
    """Weights at the start of the ramp; None for constant weights."""
    ramp_tokens: int = 0
    """Length of the ramp: shares change linearly with tokens."""

    def shares(self, tokens_N: np.ndarray) -> np.ndarray:
        """Returns the sources' shares after some tokens of the mixture, [N, S]."""
        end_S = _normalized(self.weights)
        if self.ramp_from is None:
            return np.broadcast_to(end_S, (len(tokens_N), len(end_S)))
        part_N1 = np.minimum(tokens_N / self.ramp_tokens, 1.0)[:, None]
        return (1 - part_N1) * _normalized(self.ramp_from) + part_N1 * end_S


def _normalized(weights: tuple[float, ...]) -> np.ndarray:
    weights_S = np.array(weights, np.float64)
    return weights_S / weights_S.sum()


def block_counts(mixture: Mixture, seq_len: int, blocks_N: np.ndarray) -> np.ndarray:
    """Returns the number of examples from each source in some blocks, int64 [N, S].

    Args:
      seq_len: Tokens per example, for the ramp.
      blocks_N: Numbers of blocks, from 0 at the start of the mixture.
    """
    return np.diff(_points_in(mixture, seq_len, blocks_N), axis=1, prepend=0)


def examples_before(mixture: Mixture, seq_len: int, block: int) -> np.ndarray:
    """Returns the number of examples from each source in all blocks before, int64 [S]."""
    sums_NS = _ramp_sums(mixture, seq_len)
    ramp = min(block, (len(sums_NS) - 1) * _SPAN)
    span = ramp // _SPAN
    in_span_NS = _points_in(mixture, seq_len, np.arange(span * _SPAN, ramp))
    edges_S = _edges(_normalized(mixture.weights))
    after_S = _points_below(edges_S, block) - _points_below(edges_S, ramp)
    return np.diff(sums_NS[span] + in_span_NS.sum(axis=0) + after_S, prepend=0)


@functools.lru_cache(64)
def _ramp_sums(mixture: Mixture, seq_len: int) -> np.ndarray:
    """Returns the number of points below each edge before each span of a ramp, [N, S].

    The last of them is the first one after the ramp. A span at a time needs little memory.
    """
    num_blocks = -(-mixture.ramp_tokens // (BLOCK * seq_len))
    firsts = range(0, num_blocks, _SPAN)
    spans = (np.arange(first, first + _SPAN) for first in firsts)
    sums = [_points_in(mixture, seq_len, span).sum(axis=0) for span in spans]
    return np.cumsum([np.zeros(len(mixture.weights), np.int64), *sums], axis=0)


def _points_in(mixture: Mixture, seq_len: int, blocks_N: np.ndarray) -> np.ndarray:
    """Returns the number of points below each edge in some blocks, int64 [N, S]."""
    edges_NS = _edges(mixture.shares(blocks_N * float(BLOCK * seq_len)))
    return -((_reversed_bits(blocks_N)[:, None] - edges_NS) >> _BITS)


def _edges(shares: np.ndarray) -> np.ndarray:
    """Returns the ends of the sources' ranges, in units of 2**-_BITS points."""
    return np.rint(np.cumsum(shares, axis=-1) * (BLOCK << _BITS)).astype(np.int64)


def _points_below(edges_S: np.ndarray, num_blocks: int) -> np.ndarray:
    """Returns the number of points below constant edges in the first blocks, int64 [S]."""
    whole_S, part_S = np.divmod(edges_S, 1 << _BITS)
    total_S, block = num_blocks * whole_S, 0
    # The points of 2**bit blocks from a multiple of 2**bit on are evenly spaced.
    for bit in reversed(range(_BITS)):
        if num_blocks >> bit & 1:
            gaps_S = _reversed_bits(np.array([block])) - part_S
            total_S += np.maximum(0, -(gaps_S >> (_BITS - bit)))
            block += 1 << bit
    return total_S


@functools.lru_cache(64)
def block_sources(mixture: Mixture, seq_len: int, seed: int, block: int) -> np.ndarray:
    """Returns the source of each example in a block, int64 [BLOCK]; do not write to it."""
    counts_S = block_counts(mixture, seq_len, np.array([block]))[0]
    keys = random_bits(seed, block, np.arange(BLOCK))
    sources = np.repeat(np.arange(len(counts_S)), counts_S)[np.argsort(keys, kind="stable")]
    sources.flags.writeable = False
    return sources


def random_bits(seed: int, stream: int, index: np.ndarray) -> np.ndarray:
    """Returns 64 random bits for each index, uint64; the same in every version of NumPy."""
    bits = _mixed(np.array([seed], np.uint64))
    bits = _mixed(bits ^ np.uint64(stream))
    return _mixed(bits ^ index.astype(np.uint64))


def _mixed(bits: np.ndarray) -> np.ndarray:
    """Returns the output function of SplitMix64 (doi:10.1145/2714064.2660195)."""
    bits = bits + np.uint64(0x9E3779B97F4A7C15)
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))


def _reversed_bits(blocks_N: np.ndarray) -> np.ndarray:
    """Returns elements of the van der Corput sequence, in units of 2**-_BITS, int64 [N]."""
    bits_N = blocks_N.astype(np.int64)
    for width, mask in _SWAPS:
        bits_N = (bits_N >> width & mask) | (bits_N & mask) << width
    return bits_N >> (32 - _BITS)
