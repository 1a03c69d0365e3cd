"""Best-fit packing: laws, against plain best-fit decreasing over documents."""

import hashlib

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from stackjax.data import best_fit
from stackjax.data.best_fit import Plan

document_lengths = st.lists(st.integers(1, 60), min_size=1, max_size=120).map(np.array)
similar_lengths = st.lists(st.sampled_from([1, 2, 3, 5, 7, 11]), min_size=1, max_size=200)
lengths_of_documents = document_lengths | similar_lengths.map(np.array)
seq_lens = st.integers(1, 40)


def pieces_of(lengths: np.ndarray, seq_len: int) -> list[int]:
    """Returns the lengths of pieces, a document at a time."""
    pieces = []
    for length in lengths.tolist():
        pieces += [seq_len] * (length // seq_len) + [length % seq_len] * (length % seq_len > 0)
    return pieces


def rooms_of_best_fit_decreasing(pieces: list[int], seq_len: int) -> list[int]:
    """Returns the rest of the room in each sequence, a piece at a time."""
    rooms: list[int] = []
    for piece in sorted(pieces, reverse=True):
        fitting = [index for index, room in enumerate(rooms) if room >= piece]
        if fitting:
            rooms[min(fitting, key=rooms.__getitem__)] -= piece
        else:
            rooms.append(seq_len - piece)
    return rooms


def rooms_of(plan: Plan) -> list[int]:
    sums = np.add.reduceat(plan.lengths, plan.starts[:-1])
    return (plan.seq_len - sums).tolist()


@hypothesis.given(lengths_of_documents, seq_lens)
def test_every_token_is_in_exactly_one_piece(lengths, seq_len):
    plan = best_fit.plan(lengths, seq_len)
    order = np.argsort(plan.offsets)
    ends = (plan.offsets + plan.lengths)[order]
    assert np.array_equal(plan.offsets[order], [0, *ends[:-1]])
    assert ends[-1] == lengths.sum()
    assert plan.lengths.min() > 0
    assert set(np.cumsum(lengths)) <= set(ends.tolist())


@hypothesis.given(lengths_of_documents, seq_lens)
def test_only_longer_documents_are_cut(lengths, seq_len):
    plan = best_fit.plan(lengths, seq_len)
    order = np.argsort(plan.offsets)
    assert plan.lengths[order].tolist() == pieces_of(lengths, seq_len)
    assert plan.num_cut == sum(length > seq_len for length in lengths)


@hypothesis.given(lengths_of_documents, seq_lens)
def test_sequences_are_those_of_best_fit_decreasing(lengths, seq_len):
    plan = best_fit.plan(lengths, seq_len)
    expected = rooms_of_best_fit_decreasing(pieces_of(lengths, seq_len), seq_len)
    rooms = rooms_of(plan)
    assert plan.num_sequences == len(expected)
    assert sorted(rooms) == sorted(expected)
    assert min(rooms) >= 0
    assert plan.padding == sum(expected)
    assert plan.padding_share == sum(expected) / (len(expected) * seq_len)


@hypothesis.given(lengths_of_documents, seq_lens)
def test_pieces_of_a_sequence_are_in_stream_order(lengths, seq_len):
    plan = best_fit.plan(lengths, seq_len)
    assert plan.starts[0] == 0
    assert plan.starts[-1] == len(plan.offsets) == len(plan.lengths)
    for start, stop in zip(plan.starts, plan.starts[1:], strict=False):
        assert start < stop
        assert np.all(np.diff(plan.offsets[start:stop]) > 0)


@hypothesis.given(lengths_of_documents, seq_lens, st.integers(1, 10**6))
def test_groups_are_bounded_by_the_distinct_lengths(lengths, seq_len, copies):
    counts = np.bincount(best_fit.cut(lengths, seq_len), minlength=seq_len + 1) * copies
    groups = best_fit.fit(counts, seq_len)
    assert len(groups) <= 2 * np.count_nonzero(counts)
    found = np.zeros_like(counts)
    for group in groups:
        assert sum(length * each for length, each in group.contents) <= seq_len
        for length, each in group.contents:
            found[length] += group.num_sequences * each
    assert np.array_equal(found, counts)


@pytest.mark.parametrize("dtype", [np.uint32, np.int64])
def test_dtypes(dtype):
    plan = best_fit.plan(np.array([3, 9, 4], dtype), 4)
    dtypes = [array.dtype for array in (plan.starts, plan.offsets, plan.lengths)]
    assert dtypes == [np.int64, np.int64, np.int32]


def test_longest_document_of_a_data_set():
    plan = best_fit.plan(np.array([2**32 - 1, 1], np.uint32), 2**24)
    assert (plan.num_sequences, plan.padding, plan.num_cut) == (256, 0, 1)
    assert plan.offsets[-1] + plan.lengths[-1] == 2**32


@pytest.mark.parametrize("seq_len", [2**16 - 1, 2**16, 2**24])
def test_sequences_of_any_length(seq_len):
    lengths = np.array([seq_len - 1, 1, 5, seq_len, seq_len + 3, 2])
    plan = best_fit.plan(lengths, seq_len)
    assert rooms_of(plan).count(0) == 3
    assert plan.num_sequences == 4
    assert plan.padding == seq_len - 10


GOLDEN = {
    64: "f609c9a5ee3b757f",
    300: "d325ab68d8c9b6e1",
    2048: "18dace5bf5980f1c",
}


@pytest.mark.parametrize("seq_len", GOLDEN)
def test_plan_is_the_same_everywhere(seq_len):
    number = np.arange(5000)
    plan = best_fit.plan(number * number * 7919 % 1009 + 1, seq_len)
    found = hashlib.sha256()
    for array, dtype in ((plan.starts, "<i8"), (plan.offsets, "<i8"), (plan.lengths, "<i4")):
        found.update(array.astype(dtype).tobytes())
    assert found.hexdigest()[:16] == GOLDEN[seq_len]
