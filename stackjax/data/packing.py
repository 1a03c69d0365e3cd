"""Documents packed into one stream of tokens, and how a sequence of it is masked.

Documents are joined by an end token and cut without regard to their borders, as in
arXiv:2405.15319. Shape letters: T tokens of a sequence.
"""

from collections.abc import Sequence

import numpy as np


def join_documents(
    documents: Sequence[np.ndarray], end_id: int, begin_ids: Sequence[int] = ()
) -> np.ndarray:
    """Returns the tokens of all documents in a row, an end token after each.

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
    """Returns the whole records `[n, length]` of a stream, and the tokens left over."""
    whole = len(stream) // length * length
    return stream[:whole].reshape(-1, length), stream[whole:]


def segments(tokens_T: np.ndarray, end_id: int) -> np.ndarray:
    """Returns which document each token belongs to, counted from 0 in each sequence.

    An end token belongs to the document that it ends. Any leading axes are kept.

    >>> segments(np.array([5, 0, 6, 7, 0, 8]), end_id=0).tolist()
    [0, 0, 1, 1, 1, 2]
    """
    is_end_T = (tokens_T == end_id).astype(np.int32)
    return np.cumsum(is_end_T, axis=-1, dtype=np.int32) - is_end_T


def positions(segments_T: np.ndarray) -> np.ndarray:
    """Returns the position of each token, counted from 0 at the start of its segment.

    >>> positions(np.array([0, 0, 1, 1, 1, 2])).tolist()
    [0, 1, 0, 1, 2, 0]
    """
    index_T = np.arange(segments_T.shape[-1], dtype=np.int32)
    starts_T = np.zeros(segments_T.shape, np.int32)
    is_start_T = segments_T[..., 1:] != segments_T[..., :-1]
    starts_T[..., 1:] = np.where(is_start_T, index_T[1:], 0)
    return index_T - np.maximum.accumulate(starts_T, axis=-1)


def loss_weights(segments_T: np.ndarray) -> np.ndarray:
    """Returns the weight of predicting, from each position, the token that follows.

    0 at the last position of a sequence, and where the next token is of another segment.

    >>> loss_weights(np.array([0, 0, 1, 1, 1, 2])).tolist()
    [1.0, 0.0, 1.0, 1.0, 0.0, 0.0]
    """
    weights_T = np.zeros(segments_T.shape, np.float32)
    weights_T[..., :-1] = segments_T[..., 1:] == segments_T[..., :-1]
    return weights_T
