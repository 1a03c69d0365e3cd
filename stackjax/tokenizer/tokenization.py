"""Special tokens around texts, for data, prompts, tasks and exported folders."""

from typing import NamedTuple

import numpy as np

from stackjax.tokenizer.tokenizer import Tokenizer


class Tokenization(NamedTuple):
    """A tokenizer and the special tokens around texts.

    | | |
    |---|---|
    | document | `begin_ids`, text, `tokenizer.end_id` |
    | prompt | `begin_ids`, text |
    | task text | `begin_ids`, text, `tokenizer.suffix_ids` |
    | generated text | ends at any of `end_ids` |
    | text without context | scored after `prefix_id` |
    """

    tokenizer: Tokenizer
    end_ids: tuple[int, ...]
    """Tokens that end a generated text; the first is the EOS in transformers."""
    prefix_id: int
    """The token before a text without context: the BOS, or else the EOS."""

    @property
    def begin_ids(self) -> tuple[int, ...]:
        """Tokens before every document and prompt; usually empty or the BOS."""
        return self.tokenizer.begin_ids

    def encode_prompt(self, text: str) -> np.ndarray:
        """Returns the tokens of a prompt.

        `</s>` in the text becomes the special token. If the text begins with the BOS, no
        second BOS is added.
        """
        begin_ids = () if self.begins_with_prefix(text) else self.begin_ids
        return np.array([*begin_ids, *self.tokenizer.encode_special(text)], np.int64)

    def begins_with_prefix(self, text: str) -> bool:
        """Returns whether a text begins with the name of `prefix_id`."""
        return text.startswith(self.tokenizer.written(self.prefix_id))


def tokenization(tokenizer: Tokenizer) -> Tokenization:
    """Returns the tokenization for a tokenizer without a Hugging Face folder."""
    prefix_id = (*tokenizer.begin_ids, tokenizer.end_id)[0]
    return Tokenization(tokenizer, (tokenizer.end_id,), prefix_id)
