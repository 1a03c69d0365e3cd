"""Samples of documents: even, whole, and independent of the order."""

import hypothesis
import hypothesis.strategies as st
import pytest

from stackjax.data.document import choose_split
from stackjax.data.document_sample import DocumentSample


def sample(documents: list[bytes], max_bytes: int) -> list[bytes]:
    found = DocumentSample(max_bytes)
    for document in documents:
        found.add(document)
    assert found.num_bytes == sum(map(len, found.documents))
    return sorted(found.documents)


DOCUMENTS = st.lists(st.binary(min_size=1, max_size=9), min_size=1)


@hypothesis.given(DOCUMENTS, st.integers(1, 100), st.randoms(use_true_random=False))
def test_order_of_documents_has_no_effect(documents, max_bytes, rng):
    shuffled = rng.sample(documents, len(documents))
    assert sample(shuffled, max_bytes) == sample(documents, max_bytes)


@hypothesis.given(DOCUMENTS, st.integers(9, 100))
def test_sample_is_as_large_as_fits(documents, max_bytes):
    found = sample(documents, max_bytes)
    size = sum(map(len, found))
    assert found and size <= max_bytes
    assert size == sum(map(len, documents)) or size > max_bytes - 9


@hypothesis.given(DOCUMENTS, st.integers(1, 100), st.integers(0, 100))
def test_larger_sample_contains_the_smaller_one(documents, max_bytes, more):
    small, large = sample(documents, max_bytes), sample(documents, max_bytes + more)
    assert all(small.count(each) <= large.count(each) for each in small)


def test_one_document_is_always_in_the_sample():
    assert sample([b"long"], 1) == [b"long"]
    assert sample([], 1) == []


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_sample_is_even_over_the_documents_and_both_splits(share):
    documents = [f"{index:06}" for index in range(20_000)]
    found = sample([text.encode() for text in documents], int(6 * 20_000 * share))
    texts = [each.decode() for each in found]
    assert len(texts) == 20_000 * share
    # Standard errors are below 0.012.
    assert sum(int(text) < 10_000 for text in texts) / len(texts) == pytest.approx(
        0.5, abs=0.04
    )
    held_out = sum(choose_split(text, 0.1) == "validation" for text in texts) / len(texts)
    assert held_out == pytest.approx(0.1, abs=0.04)
