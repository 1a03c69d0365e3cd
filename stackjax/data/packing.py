"""Packing of documents into a token stream, and document masks for sequences.

The stream is cut into sequences without regard to document borders, as in arXiv:2405.15319;
`best_fit` has the packing of whole documents. Shapes: T tokens in a sequence.
"""

from collections.abc import Sequence

import numpy as np

PADDING = -1
"""The segment of padding, which is at the end of a sequence."""


def join_documents(
    documents: Sequence[np.ndarray], end_id: int, begin_ids: Sequence[int] = ()
) -> np.ndarray:
    """Returns all documents concatenated, each followed by an end token.

    >>> join_documents([np.array([5, 6]), np.array([7])], end_id=0).tolist()
    [5, 6, 0, 7, 0]
    >>> join_documents([np.array([5, 6]), np.array([7])], end_id=0, begin_ids=[1]).tolist()
    [1, 5, 6, 0, 1, 7, 0]
    """
    begin = np.asarray(begin_ids, np.int64)
    end = np.array([end_id], np.int64)
    parts = [part for document in documents for part in (begin, document, end)]
    return np.concatenate(parts) if parts else np.empty(0, np.int64)


def cut_records(stream: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns a stream's complete records [n, length], and the remaining tokens."""
    whole = len(stream) // length * length
    return stream[:whole].reshape(-1, length), stream[whole:]


def segments(tokens_T: np.ndarray, end_id: int) -> np.ndarray:
    """Returns each token's document index, from 0 in each sequence, [..., T].

    An end token belongs to the document before.

    >>> segments(np.array([5, 0, 6, 7, 0, 8]), end_id=0).tolist()
    [0, 0, 1, 1, 1, 2]
    """
    is_end_T = (tokens_T == end_id).astype(np.int32)
    return np.cumsum(is_end_T, axis=-1, dtype=np.int32) - is_end_T


def without_borders(segments_T: np.ndarray) -> np.ndarray:
    """Returns segments with all documents of a sequence in one, and padding in another.

    >>> without_borders(np.array([0, 0, 1, 2, PADDING])).tolist()
    [0, 0, 0, 0, -1]
    """
    return np.minimum(segments_T, 0)


def positions(segments_T: np.ndarray) -> np.ndarray:
    """Returns each token's position, from 0 at the start of each segment.

    >>> positions(np.array([0, 0, 1, 1, 1, 2])).tolist()
    [0, 1, 0, 1, 2, 0]
    """
    index_T = np.arange(segments_T.shape[-1], dtype=np.int32)
    starts_T = np.zeros(segments_T.shape, np.int32)
    is_start_T = segments_T[..., 1:] != segments_T[..., :-1]
    starts_T[..., 1:] = np.where(is_start_T, index_T[1:], 0)
    return index_T - np.maximum.accumulate(starts_T, axis=-1)


def loss_weights(segments_T: np.ndarray) -> np.ndarray:
    """Returns the weight of the next-token prediction at each position.

    The weight is 0 at the end of a sequence, before a token in another segment, and in padding;
    else 1.

    >>> loss_weights(np.array([0, 0, 1, 1, 1, PADDING, PADDING])).tolist()
    [1.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0]
    """
    weights_T = np.zeros(segments_T.shape, np.float32)
    is_same_T = segments_T[..., 1:] == segments_T[..., :-1]
    weights_T[..., :-1] = is_same_T & (segments_T[..., 1:] != PADDING)
    return weights_T
