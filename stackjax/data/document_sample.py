"""An even sample of documents, selected by a text hash."""

import hashlib
import heapq


class DocumentSample:
    """Documents in the order of their hashes, up to a total size; at least one document.

    The sample is a pure function of the documents: their order has no effect.
    """

    def __init__(self, max_bytes: int):
        self._max_bytes = max_bytes
        self._largest_first: list[tuple[int, bytes]] = []
        self._first_left_out: tuple[int, bytes] | None = None
        self.num_bytes = 0

    def add(self, document: bytes) -> None:
        """Adds a document, and leaves out the last documents if they no longer fit."""
        item = (-_hash(document), document)
        if self._first_left_out is not None and item <= self._first_left_out:
            return
        heapq.heappush(self._largest_first, item)
        self.num_bytes += len(document)
        while self.num_bytes > self._max_bytes and len(self._largest_first) > 1:
            self._first_left_out = heapq.heappop(self._largest_first)
            self.num_bytes -= len(self._first_left_out[1])

    @property
    def documents(self) -> list[bytes]:
        """The sample."""
        return [document for _, document in self._largest_first]


def _hash(document: bytes) -> int:
    # Not the hash of `choose_split`, or the sample would be the documents for validation.
    digest = hashlib.blake2b(document, digest_size=8, person=b"tokenizer").digest()
    return int.from_bytes(digest, "big")
