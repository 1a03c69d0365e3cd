"""Totals over the input files of a data set, and the largest of them."""

import dataclasses
import heapq
from collections.abc import Iterator

from stackjax.data.counts import InputCounts, read_inputs


@dataclasses.dataclass(frozen=True, kw_only=True)
class InputTotals:
    """Documents from all input files."""

    files: int
    """Number of input files."""
    documents: int
    """Documents in the data set."""
    bytes: int
    """Total size of these documents: UTF-8 bytes, or bytes of tokens."""
    largest: tuple[InputCounts, ...]
    """The files with the most bytes, in descending order."""


def total_inputs(path: str, num_largest: int) -> InputTotals:
    """Returns the totals for a data set with counts, in flat memory.

    Args:
      num_largest: Number of files to name, at least 1.

    Raises:
      UserError: The counts are damaged.
    """
    files = documents = num_bytes = 0

    def counted() -> Iterator[InputCounts]:
        nonlocal files, documents, num_bytes
        for each in read_inputs(path):
            files += 1
            documents += each.documents
            num_bytes += each.bytes
            yield each

    largest = heapq.nlargest(num_largest, counted(), key=lambda each: each.bytes)
    return InputTotals(
        files=files, documents=documents, bytes=num_bytes, largest=tuple(largest)
    )
