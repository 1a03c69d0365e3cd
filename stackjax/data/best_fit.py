"""Best-fit packing of documents into sequences, with as few cuts as possible.

Best-fit decreasing, as in arXiv:2404.10830: documents that fit into a sequence are never cut.
It runs on the histogram of lengths, as in arXiv:2107.02027: sequences with equal contents are a
group, so its time depends on the number of lengths, not of documents. Shapes: N documents, P
pieces of documents, K sequences.
"""

import dataclasses
import heapq
from typing import NamedTuple

import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """The pieces of each sequence; a piece is a range of tokens in the stream.

    The pieces [starts[k], starts[k + 1]) belong to sequence k, in stream order.
    """

    seq_len: int
    """Tokens in each sequence (T)."""
    starts: np.ndarray
    """int64 [K + 1]: the first piece of each sequence, then P."""
    offsets: np.ndarray
    """int64 [P]: the first token of each piece."""
    lengths: np.ndarray
    """int32 [P]: the number of tokens in each piece."""
    num_cut: int
    """Number of documents in more than one piece; all are longer than T."""

    @property
    def num_sequences(self) -> int:
        """Number of sequences (K)."""
        return len(self.starts) - 1

    @property
    def padding(self) -> int:
        """Number of places without a token, in all sequences."""
        return self.num_sequences * self.seq_len - int(self.lengths.sum(dtype=np.int64))

    @property
    def padding_share(self) -> float:
        """Share of places without a token."""
        return self.padding / (self.num_sequences * self.seq_len)


class Group(NamedTuple):
    """Sequences with the same lengths of pieces."""

    num_sequences: int
    contents: tuple[tuple[int, int], ...]
    """Pairs (length, number of pieces with this length in each sequence)."""


def plan(lengths_N: np.ndarray, seq_len: int) -> Plan:
    """Returns the packing of at least one document; the same on any platform.

    Longer documents are cut into pieces of `seq_len` tokens and a rest. The number of
    sequences is exactly the number of best-fit decreasing over all pieces.

    Args:
      lengths_N: Positive token counts, in stream order.
    """
    lengths_P = cut(lengths_N, seq_len)
    counts = np.bincount(lengths_P, minlength=seq_len + 1)
    sequences_P = _assign(lengths_P, counts, fit(counts, seq_len))
    order_P = np.argsort(sequences_P, kind="stable")
    starts = np.concatenate([[0], np.cumsum(np.bincount(sequences_P))])
    ends_P = np.cumsum(lengths_P, dtype=np.int64)
    lengths = lengths_P[order_P]
    return Plan(
        seq_len=seq_len,
        starts=starts,
        offsets=ends_P[order_P] - lengths,
        lengths=lengths,
        num_cut=int(np.count_nonzero(lengths_N > seq_len)),
    )


def cut(lengths_N: np.ndarray, seq_len: int) -> np.ndarray:
    """Returns the lengths of all pieces in stream order, int32 [P].

    >>> cut(np.array([3, 10, 4]), seq_len=4).tolist()
    [3, 4, 4, 2, 4]
    """
    ends_N = np.cumsum(-(-lengths_N.astype(np.int64) // seq_len))
    lengths_P = np.full(ends_N[-1], seq_len, np.int32)
    lengths_P[ends_N - 1] = (lengths_N - 1) % seq_len + 1
    return lengths_P


def fit(counts: np.ndarray, seq_len: int) -> list[Group]:
    """Returns the groups of sequences from best-fit decreasing.

    Best fit puts as many pieces of a length as possible into a sequence before it takes the
    next one, as the fullest sequence with room stays the fullest. So groups are filled at once.

    Args:
      counts: The number of pieces with each length from 0 to `seq_len`.

    >>> [tuple(group) for group in fit(np.array([0, 3, 0, 2, 0]), seq_len=4)]
    [(2, ((3, 1), (1, 1))), (1, ((1, 1),))]
    """
    # Rooms below the current length wait; lengths only become smaller.
    waiting: dict[int, list[Group]] = {}
    waiting_rooms: list[int] = []  # a heap of negative rooms
    # Groups with enough room, the fullest last: a new group has less room than all others.
    fitting: list[tuple[int, Group]] = []
    packed: list[Group] = []
    for length in np.flatnonzero(counts)[::-1].tolist():
        while waiting_rooms and -waiting_rooms[0] >= length:
            room = -heapq.heappop(waiting_rooms)
            fitting.extend((room, group) for group in waiting.pop(room))
        left = int(counts[length])
        while left:
            if fitting:
                room, group = fitting.pop()
            else:
                room, group = seq_len, Group(-(-left // (seq_len // length)), ())
            each = room // length
            num_filled, rest = divmod(min(left, group.num_sequences * each), each)
            left -= num_filled * each + rest
            num_others = group.num_sequences - num_filled - bool(rest)
            if num_others:
                fitting.append((room, Group(num_others, group.contents)))
            if rest:
                partial = Group(1, (*group.contents, (length, rest)))
                fitting.append((room - rest * length, partial))
            if not num_filled:
                continue
            filled = Group(num_filled, (*group.contents, (length, each)))
            room -= each * length
            if not room:
                packed.append(filled)
            elif room in waiting:
                waiting[room].append(filled)
            else:
                waiting[room] = [filled]
                heapq.heappush(waiting_rooms, -room)
    packed.extend(group for _, group in fitting)
    packed.extend(group for groups in waiting.values() for group in groups)
    return packed


def _assign(lengths_P: np.ndarray, counts: np.ndarray, groups: list[Group]) -> np.ndarray:
    """Returns the sequence of each piece, unsigned [P].

    Pieces of equal length go to the groups, and to the sequences in a group, in stream order.
    """
    # A stable sort of 16 bits takes linear time.
    keys_P = lengths_P.astype(np.uint16) if len(counts) <= 2**16 else lengths_P
    order_P = np.argsort(keys_P, kind="stable")
    nexts = (np.cumsum(counts) - counts).tolist()
    num_sequences = sum(group.num_sequences for group in groups)
    sequences_P = np.empty(len(lengths_P), np.min_scalar_type(num_sequences))
    first = 0
    for group in groups:
        last = first + group.num_sequences
        for length, each in group.contents:
            start = nexts[length]
            nexts[length] = stop = start + group.num_sequences * each
            sequences_P[order_P[start:stop]] = np.repeat(np.arange(first, last), each)
        first = last
    return sequences_P
