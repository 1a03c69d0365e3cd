"""Documents by length: the judge is numpy on all lengths."""

import numpy as np
import pytest
from test_lengths import DOCUMENTS, LENGTHS

from stackjax.data import packing
from stackjax.data.length_counts import Bin, count_lengths, split_lengths
from stackjax.data.manifest import Split
from stackjax.data.shards import ShardWriter
from stackjax.runtime.errors import UserError

LARGEST = 2**32 - 1
RNG = np.random.default_rng(0)
CASES = {
    "one": [1],
    "edges": [n + d for n in (2, 4, 512, 1024, 2**16, 2**31) for d in (-1, 0, 1)],
    "largest": [LARGEST, LARGEST, 1],
    "short": RNG.geometric(0.1, 5000),
    "short, even number": RNG.geometric(0.01, 5001),
    "long": 1 + RNG.lognormal(7, 2, 5000),
}


@pytest.fixture(params=CASES)
def lengths(request) -> np.ndarray:
    return np.array(CASES[request.param]).astype(np.uint32)


def test_counts_are_those_of_the_lengths(lengths):
    counts = count_lengths(lengths)
    assert (counts.documents, counts.tokens) == (len(lengths), lengths.sum(dtype=int))
    assert counts.longest == lengths.max()
    assert counts.mean == pytest.approx(lengths.mean(dtype=float), rel=1e-12)
    assert counts.median == pytest.approx(np.median(lengths.astype(float)), rel=1e-3)


@pytest.mark.parametrize("limit", [0, 1, 2, 3, 100, 512, 1000, 1024, *2 ** np.arange(11, 33)])
def test_documents_up_to_a_length_are_exact(lengths, limit):
    fitting = lengths[lengths <= limit]
    expected = len(fitting), fitting.sum(dtype=int)
    assert count_lengths(lengths).up_to(int(limit)) == expected


@pytest.mark.parametrize("limit", [1500, 5000, 100_000])
def test_documents_up_to_other_lengths_are_near(lengths, limit):
    found, _ = count_lengths(lengths).up_to(limit)
    assert np.sum(lengths <= 0.998 * limit) <= found <= np.sum(lengths <= limit)


def test_bins_are_octaves_from_the_shortest_to_the_longest(lengths):
    bins = count_lengths(lengths).octaves()
    for low, high, documents, tokens in bins:
        inside = lengths[(low < lengths) & (lengths <= high)]
        assert (documents, tokens) == (len(inside), inside.sum(dtype=int))
        assert high == max(1, 2 * low)
    assert bins[0].documents and bins[-1].documents
    assert sum(each.documents for each in bins) == len(lengths)


def test_medians_of_short_documents_are_exact():
    for lengths in ([1, 2], [3, 1, 2], [1000, 1023], [7]):
        assert count_lengths(np.array(lengths, np.uint32)).median == np.median(lengths)


def test_no_documents_have_no_bins():
    counts = count_lengths(np.empty(0, np.uint32))
    assert (counts.documents, counts.tokens, counts.longest) == (0, 0, 0)
    assert counts.octaves() == []


def test_length_in_tokens_has_its_own_bin():
    assert count_lengths(np.array([1], np.uint32)).octaves() == [Bin(0, 1, 1, 1)]
    assert count_lengths(np.array([2], np.uint32)).octaves() == [Bin(1, 2, 1, 2)]


@pytest.fixture
def split(tmp_path) -> Split:
    """Two shards with the same documents."""
    shards = []
    for name in ("train-0", "train-1"):
        writer = ShardWriter(tmp_path / name, "uint16")
        writer.write(packing.join_documents(DOCUMENTS, end_id=0), np.array(LENGTHS))
        shards.append(writer.close())
    tokens = sum(shard.tokens for shard in shards)
    return Split(tokens=tokens, documents=2 * len(LENGTHS), shards=tuple(shards))


def test_shards_add_up(tmp_path, split):
    counts = split_lengths(str(tmp_path), split)
    expected = count_lengths(np.array(LENGTHS * 2, np.uint32))
    assert counts.documents_B.tolist() == expected.documents_B.tolist()
    assert counts.tokens_B.tolist() == expected.tokens_B.tolist()
    assert counts.longest == 3000


def test_damaged_lengths_are_refused(tmp_path, split):
    (tmp_path / split.shards[1].lengths.file).write_bytes(b"1234")
    with pytest.raises(
        UserError, match=r"train-1.lengths' has other lengths.*prepare it again"
    ):
        split_lengths(str(tmp_path), split)
