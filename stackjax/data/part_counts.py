"""Counts and document hashes of a part, while it is written."""

from array import array
from collections import Counter, defaultdict

from stackjax.data.counts import InputCounts
from stackjax.data.document import Document
from stackjax.data.manifest import SplitName
from stackjax.data.text_field import Reason


class PartCounts:
    """Running counts by input file, and document hashes by split."""

    def __init__(self):
        self.hashes: dict[SplitName, array] = defaultdict(lambda: array("Q"))
        self._documents = Counter[str]()
        self._bytes = Counter[str]()
        self._left_out: dict[str, Counter[str]] = {}

    def open(self, source: str) -> None:
        """Adds an input file, perhaps without documents."""
        self._left_out.setdefault(source, Counter())

    def add(self, document: Document) -> None:
        """Counts a document in the data set."""
        self.hashes[document.split].append(document.hash)
        self._documents[document.source] += 1
        self._bytes[document.source] += document.bytes

    def leave_out(self, source: str, reason: Reason) -> None:
        """Counts a row or document outside the data set."""
        self._left_out[source][reason] += 1

    def inputs(self) -> tuple[InputCounts, ...]:
        """Returns the counts by input file, in order."""
        return tuple(
            InputCounts(
                source=source,
                documents=self._documents[source],
                bytes=self._bytes[source],
                left_out=dict(left_out),
            )
            for source, left_out in self._left_out.items()
        )
