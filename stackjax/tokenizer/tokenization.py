"""The special tokens around texts: one rule for data, prompts, tasks and exported folders."""

from typing import NamedTuple

import numpy as np

from stackjax.tokenizer.tokenizer import Tokenizer


class Tokenization(NamedTuple):
    """How the texts of a model begin and end.

    | | |
    |---|---|
    | a document in the data | `begin_ids`, its text, `end_id` of the tokenizer |
    | a prompt | `begin_ids`, its text |
    | a text of a task | `begin_ids`, its text, `suffix_ids` of the tokenizer |
    | a generated text | ends at any of `end_ids` |
    | a text without context | is scored after `prefix_id` |
    """

    tokenizer: Tokenizer
    end_ids: tuple[int, ...]
    """Tokens at the end of generated texts; the first is the EOS of transformers."""
    prefix_id: int
    """The BOS, or else the EOS: the token before a text without context."""

    @property
    def begin_ids(self) -> tuple[int, ...]:
        """Tokens before every document and prompt; often none, or the BOS alone."""
        return self.tokenizer.begin_ids

    @property
    def is_prefixed(self) -> bool:
        """Whether every document and prompt begins with `prefix_id`."""
        return self.begin_ids[:1] == (self.prefix_id,)

    def encode_prompt(self, text: str) -> np.ndarray:
        """Returns the tokens of a text to be continued.

        `</s>` in the text is the special token. After a BOS in the text no other is added.
        """
        begin_ids = () if self.is_begun(text) else self.begin_ids
        return np.array([*begin_ids, *self.tokenizer.encode_marked(text)], np.int64)

    def is_begun(self, text: str) -> bool:
        """Returns whether a text begins with the name of `prefix_id`."""
        return text.startswith(self.tokenizer.written(self.prefix_id))


def tokenization(tokenizer: Tokenizer) -> Tokenization:
    """Returns how a model reads texts if only its tokenizer says so."""
    prefix_id = (*tokenizer.begin_ids, tokenizer.end_id)[0]
    return Tokenization(tokenizer, (tokenizer.end_id,), prefix_id)
