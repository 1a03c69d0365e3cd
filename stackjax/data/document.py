"""Documents on their way into token shards."""

import dataclasses

import numpy as np

from stackjax.data.hashes import hash_document
from stackjax.data.manifest import SplitName


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Document:
    """A document and its place."""

    split: SplitName
    """The split in the data set."""
    content: str | np.ndarray
    """A text, or tokens [T] without begin and end tokens."""
    hash: int
    """`hash_document` of the UTF-8 text, or of the tokens in the data set's dtype."""
    bytes: int
    """Size of the UTF-8 text, or of the tokens."""
    source: str
    """The input file."""


def choose_split(text: str, validation_fraction: float) -> SplitName:
    """Returns a document's split, a pure function of the text."""
    return split_of_hash(hash_document(text.encode("utf-8")), validation_fraction)


def split_of_hash(document_hash: int, validation_fraction: float) -> SplitName:
    """Returns the split of a document with this hash."""
    return "validation" if document_hash < validation_fraction * 2**64 else "train"
