"""Documents that are tokens already."""

import dataclasses
from collections.abc import Iterator

import numpy as np

from stackjax.runtime.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenRules:
    """The tokens that the tokenizer allows and adds."""

    vocab_size: int
    """Upper bound of the ids: every id is below."""
    begin_ids: tuple[int, ...]
    """The tokens at the beginning of each document."""
    end_id: int
    """The token at the end of each document."""


def split_documents(tokens_T: np.ndarray, rules: TokenRules) -> Iterator[np.ndarray]:
    """Yields the nonempty documents between end tokens, without begin and end tokens."""
    bounds = np.flatnonzero(tokens_T == rules.end_id)
    for document in np.split(tokens_T, bounds):
        body = document[1:] if len(document) and document[0] == rules.end_id else document
        if len(body):
            yield without_begin(body, rules)


def without_begin(tokens_T: np.ndarray, rules: TokenRules) -> np.ndarray:
    """Returns tokens without the tokenizer's begin tokens."""
    count = len(rules.begin_ids)
    is_there = count and tokens_T[:count].tolist() == list(rules.begin_ids)
    return tokens_T[count:] if is_there else tokens_T


def check_vocabulary(tokens_T: np.ndarray, rules: TokenRules, path: str) -> None:
    """Raises UserError for a token outside the vocabulary."""
    for token in (tokens_T.min(initial=0), tokens_T.max(initial=0)):
        if not 0 <= token < rules.vocab_size:
            raise UserError(
                f"{path!r} has the token {token}, but the vocabulary of the tokenizer has the "
                f"ids 0 to {rules.vocab_size - 1}; name with --tokenizer the one that made it."
            )
