"""The order of the data: laws, against a simulation that reads example by example."""

import collections
import dataclasses
import hashlib
import itertools

import grain
import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from stackjax.data.mixture import BLOCK, Mixture, block_sources
from stackjax.data.order import (
    LANES,
    Order,
    Segment,
    epochs_read,
    find,
    join_segments,
    length_at,
    tokens_read,
)

EVEN, HEAVY = Mixture(weights=(1.0, 1.0, 2.0)), Mixture(weights=(0.0, 9.0, 1.0))
RAMP = Mixture(weights=(1.0, 0.0, 0.0), ramp_from=(0.0, 1.0, 1.0), ramp_tokens=3 * BLOCK * 8)


def segment(first_example, seq_len=8, mixture=EVEN) -> Segment:
    return Segment(first_example=first_example, seq_len=seq_len, mixture=mixture)


def order_of(*segments, num_chunks=(120, 300, 2000), chunk_len=8, seed=3) -> Order:
    return Order(seed=seed, chunk_len=chunk_len, num_chunks=num_chunks, segments=segments)


ORDERS = {
    "one length": order_of(segment(0)),
    "new weights in the middle of an epoch": order_of(segment(0), segment(500, mixture=HEAVY)),
    "ramp": order_of(segment(0, mixture=RAMP)),
    "longer sequences": order_of(segment(0, 2), segment(700, 4), segment(1111, 8, HEAVY)),
    "shorter sequences": order_of(segment(0, 8), segment(90, 2), segment(95, 2, HEAVY)),
    "one source": order_of(
        segment(0, 4, Mixture(weights=(1.0,))),
        segment(50, 8, Mixture(weights=(1.0,))),
        num_chunks=(130,),
    ),
}


class Reader:
    """Reads the sequences of one source in turn, in plain Python."""

    def __init__(self, order: Order, source: int):
        self.order, self.source = order, source
        self.opened = 0
        self.queue = collections.deque()

    def start(self, seq_len: int) -> None:
        """Drops what is left of open chunks."""
        self.pieces = self.order.chunk_len // seq_len
        self.queue.clear()

    def next(self) -> tuple[int, int]:
        """Returns chunk, counted over all epochs, and piece of the next sequence."""
        if not self.queue:
            size = self.order.num_chunks[self.source]
            lanes = min(LANES, size - self.opened % size)
            chunks = range(self.opened, self.opened + lanes)
            pieces = itertools.product(range(self.pieces), chunks)
            self.queue.extend((chunk, piece) for piece, chunk in pieces)
        chunk, piece = self.queue.popleft()
        self.opened = max(self.opened, chunk + 1)
        return chunk, piece


def simulate(order: Order, num_examples: int) -> list[tuple[int, int, int]]:
    """Returns source, chunk and piece of each example."""
    readers = [Reader(order, source) for source in range(len(order.num_chunks))]
    found = []
    for each, following in itertools.zip_longest(order.segments, order.segments[1:]):
        for reader in readers:
            reader.start(each.seq_len)
        stop = num_examples if following is None else following.first_example
        for offset in range(stop - each.first_example):
            block, row = divmod(offset, BLOCK)
            source = block_sources(each.mixture, each.seq_len, order.seed, block)[row]
            found.append((int(source), *readers[source].next()))
    return found


def permutation(order: Order, source: int, num_examples: int) -> np.ndarray:
    """Returns the shuffled chunks of a source, for some epochs."""
    alone = Mixture(weights=tuple(np.eye(len(order.num_chunks))[source]))
    whole = dataclasses.replace(order, segments=(segment(0, order.chunk_len, alone),))
    return find(whole, np.arange(num_examples)).sequences


@pytest.mark.parametrize("source", [0, 1, 2])
def test_every_epoch_of_a_source_is_a_new_permutation(source):
    order = ORDERS["one length"]
    size = order.num_chunks[source]
    epochs = permutation(order, source, 4 * size).reshape(4, size)
    for epoch in epochs:
        assert sorted(epoch) == list(range(size))
    assert len({tuple(epoch) for epoch in epochs}) == 4


@pytest.mark.parametrize("name", ORDERS)
def test_order_is_that_of_reading_in_turn(name):
    order, num_examples = ORDERS[name], BLOCK + 500 if name == "ramp" else 1500
    simulated = simulate(order, num_examples)
    shuffled = [
        permutation(
            order, source, 1 + max((c for s, c, _ in simulated if s == source), default=0)
        )
        for source in range(len(order.num_chunks))
    ]
    for first, stop in ranges(order, num_examples):
        places = find(order, np.arange(first, stop))
        pieces = order.chunk_len // length_at(order, first)
        expected = [
            (source, shuffled[source][chunk] * pieces + piece)
            for source, chunk, piece in simulated[first:stop]
        ]
        assert list(zip(*places, strict=True)) == expected


def ranges(order: Order, num_examples: int) -> list[tuple[int, int]]:
    """Returns the first and last examples of all segments, up to an example."""
    firsts = [each.first_example for each in order.segments]
    bounds = [min(example, num_examples) for example in (*firsts, num_examples)]
    return [(first, stop) for first, stop in itertools.pairwise(bounds) if first < stop]


def spans(order: Order, num_examples: int) -> dict[int, list[range]]:
    """Returns the tokens of each example, by source."""
    found = collections.defaultdict(list)
    for first, stop in ranges(order, num_examples):
        seq_len = length_at(order, first)
        for source, sequence in zip(*find(order, np.arange(first, stop)), strict=True):
            found[int(source)].append(range(sequence * seq_len, (sequence + 1) * seq_len))
    return found


@pytest.mark.parametrize("name", ORDERS)
def test_no_chunk_is_opened_twice_before_all_are(name):
    order = ORDERS[name]
    for source, read in spans(order, 1500).items():
        num_chunks = order.num_chunks[source]
        times = collections.Counter()
        opened = collections.Counter()
        for span in read:
            chunk = span[0] // order.chunk_len
            times.update(span)
            opened[chunk] = max(opened[chunk], *(times[token] for token in span))
            assert max(opened.values()) - min(opened[c] for c in range(num_chunks)) <= 1


@pytest.mark.parametrize("name", ORDERS)
def test_tokens_read_are_those_of_all_examples(name):
    order = ORDERS[name]
    for example in (0, 1, 94, 95, 700, 1499):
        read = spans(order, example)
        expected = [sum(map(len, read[source])) for source in range(len(order.num_chunks))]
        np.testing.assert_array_equal(tokens_read(order, example), expected)


@hypothesis.given(
    cuts=st.lists(st.integers(1, 3000), max_size=4, unique=True),
    first=st.integers(0, 2 * BLOCK),
    count=st.integers(1, 300),
)
@hypothesis.settings(max_examples=30, deadline=None)
def test_cuts_into_stages_and_batches_do_not_change_the_order(cuts, first, count):
    whole = order_of(segment(0, mixture=RAMP))
    pieces = (segment(cut, mixture=RAMP) for cut in (0, *sorted(cuts)))
    assert join_segments(tuple(pieces)) == whole.segments
    together = find(whole, np.arange(first, first + count))
    apart = [find(whole, np.array([example])) for example in range(first, first + count)]
    for field in ("sources", "sequences"):
        joined = np.concatenate([getattr(each, field) for each in apart])
        np.testing.assert_array_equal(getattr(together, field), joined)


def test_empty_segments_are_left_out():
    segments = (segment(0), segment(0, 4), segment(9, 4), segment(9, 8))
    assert join_segments(segments) == (segment(0, 4), segment(9, 8))


@pytest.mark.parametrize("seed", [0, 5, 2**32 - 1])
def test_run_with_one_source_reads_grains_shuffle(seed):
    order = order_of(segment(0, mixture=Mixture(weights=(1.0,))), num_chunks=(37,), seed=seed)
    shuffled = grain.MapDataset.range(37).seed(seed).shuffle()
    places = find(order, np.arange(100))
    assert places.sequences.tolist() == [shuffled[k] for k in range(100)]
    assert not places.sources.any()


def test_epochs_count_from_the_start_of_the_run():
    one = Mixture(weights=(1.0,))
    order = order_of(segment(0, 4, one), segment(60, 8, one), num_chunks=(130,))
    np.testing.assert_allclose(epochs_read(order, 0), [0])
    np.testing.assert_allclose(epochs_read(order, 30), [30 * 4 / (130 * 8)])
    np.testing.assert_allclose(epochs_read(order, 60 + 61), [(60 * 4 + 61 * 8) / (130 * 8)])


def test_examples_far_ahead_take_no_time():
    order = order_of(segment(0), segment(10**11, 4), segment(10**11 + 10**6, 8, HEAVY))
    assert find(order, np.array([10**12])).sources.shape == (1,)
    assert tokens_read(order, 10**12).sum() == 8 * (10**12 - 10**6) + 4 * 10**6


# Of sources and sequences, as little-endian int64: the order may not change between versions.
GOLDEN = {
    "one length": "ccfad77efa8739b7",
    "new weights in the middle of an epoch": "46b7284bcf46c9c5",
    "ramp": "2c6d37fe1ee2d56e",
    "longer sequences": "9d81a5a576f9c587",
    "shorter sequences": "c3813fe06fea9dd6",
    "one source": "b49d7a8751aa36ab",
}


@pytest.mark.parametrize("name", ORDERS)
def test_order_is_the_same_in_every_version(name):
    order, digest = ORDERS[name], hashlib.sha256()
    for first, stop in ranges(order, BLOCK + 1000):
        for field in find(order, np.arange(first, stop)):
            digest.update(field.astype("<i8").tobytes())
    assert digest.hexdigest()[:16] == GOLDEN[name]


def test_another_seed_gives_another_order():
    one, other = (
        find(dataclasses.replace(ORDERS["one length"], seed=seed), np.arange(BLOCK))
        for seed in (0, 1)
    )
    assert (one.sources != other.sources).any()
