"""Packing: token streams, records and document masks."""

import hypothesis
import hypothesis.strategies as st
import numpy as np

from stackjax.data import packing

END = 0
document_lists = st.lists(
    st.lists(st.integers(1, 99), max_size=9).map(lambda ids: np.array(ids, np.int64))
)
padded_segments = st.lists(st.integers(1, 5), max_size=8).flatmap(
    lambda sizes: st.integers(0 if sizes else 1, 9).map(
        lambda padding: np.array(
            [*np.repeat(np.arange(len(sizes)), sizes), *[packing.PADDING] * padding], np.int32
        )
    )
)
sequences = st.lists(st.integers(0, 3), min_size=1, max_size=40).map(np.array)


@hypothesis.given(document_lists)
def test_joined_documents_split_at_end_tokens(documents):
    stream = packing.join_documents(documents, END)
    ends = np.flatnonzero(stream == END)
    parts = np.split(stream, ends + 1)
    assert len(parts.pop()) == 0
    assert [part[:-1].tolist() for part in parts] == [d.tolist() for d in documents]


@hypothesis.given(document_lists, st.integers(1, 7))
def test_records_and_remainder_make_up_the_stream(documents, length):
    stream = packing.join_documents(documents, END)
    records, rest = packing.cut_records(stream, length)
    assert records.shape[1:] == (length,)
    assert len(rest) < length
    assert np.array_equal(np.concatenate([records.ravel(), rest]), stream)


@hypothesis.given(sequences)
def test_masks_match_a_loop_over_tokens(tokens):
    segments, positions, weights = [], [], []
    segment = position = 0
    for index, token in enumerate(tokens):
        segments.append(segment)
        positions.append(position)
        weights.append(float(token != END and index + 1 < len(tokens)))
        segment, position = (segment + 1, 0) if token == END else (segment, position + 1)
    segments_T = packing.segments(tokens, END)
    assert segments_T.tolist() == segments
    assert packing.positions(segments_T).tolist() == positions
    assert packing.loss_weights(segments_T).tolist() == weights


@hypothesis.given(sequences)
def test_masks_of_rows_are_independent(tokens):
    both = np.stack([tokens, np.roll(tokens, 1)])[:, None]
    segments = packing.segments(both, END)
    for row in range(2):
        alone = packing.segments(both[row, 0], END)
        assert np.array_equal(segments[row, 0], alone)
        for function in (packing.positions, packing.loss_weights):
            assert np.array_equal(function(segments)[row, 0], function(alone))


@hypothesis.given(padded_segments)
def test_padding_has_no_loss(segments):
    weights = []
    for segment, after in zip(segments, [*segments[1:], None], strict=True):
        weights.append(float(segment == after and segment != packing.PADDING))
    assert packing.loss_weights(segments).tolist() == weights
    shape = (2, 1, len(segments))
    rows = np.broadcast_to(segments, shape)
    assert np.array_equal(packing.loss_weights(rows), np.broadcast_to(weights, shape))


@hypothesis.given(padded_segments)
def test_documents_of_a_padded_sequence_count_from_zero(segments):
    positions = packing.positions(segments)
    for segment in set(segments.tolist()):
        found = positions[segments == segment]
        assert found.tolist() == list(range(len(found)))


@hypothesis.given(padded_segments)
def test_without_borders_a_padded_sequence_is_a_shorter_one(segments):
    merged = packing.without_borders(segments)
    assert merged.dtype == segments.dtype
    num_tokens = int((segments != packing.PADDING).sum())
    tokens = np.zeros(num_tokens, np.int32)
    assert np.array_equal(merged == packing.PADDING, segments == packing.PADDING)
    for function in (packing.positions, packing.loss_weights):
        assert np.array_equal(function(merged)[:num_tokens], function(tokens))
    assert not packing.loss_weights(merged)[num_tokens:].any()


def test_single_segment_counts_up_and_drops_the_last_prediction():
    segments = np.zeros((2, 5), np.int32)
    assert packing.positions(segments).tolist() == [[0, 1, 2, 3, 4]] * 2
    assert packing.loss_weights(segments).tolist() == [[1, 1, 1, 1, 0]] * 2


def test_dtypes_match_batch():
    segments = packing.segments(np.array([1, 0, 2], np.int32), END)
    assert segments.dtype == packing.positions(segments).dtype == np.int32
    assert packing.loss_weights(segments).dtype == np.float32
