"""The options of `tokenizer`."""

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from stackjax.data.text_field import Treatment
from stackjax.runtime.constraints import Checked
from stackjax.runtime.numbers import Size, Text, Tokens
from stackjax.runtime.ranges import Length


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerConfig(Checked):
    """Trains a byte-level BPE tokenizer, for `prepare --tokenizer`."""

    inputs: Annotated[
        tuple[str, ...],
        tyro.conf.Positional,
        tyro.conf.arg(metavar="INPUT..."),
        Length(at_most=1_000_000),
    ]
    """Texts, as for `prepare`: tfds:NAME, or a file or glob: .jsonl, .ndjson, .json (also with
    .gz or .zst), .parquet, or plain text with one document per file."""
    vocab_size: Size
    """Number of entries in the vocabulary: special tokens, 256 bytes and merges."""
    output: Path = Path("tokenizer.json")
    """New file for the tokenizer."""
    special_tokens: Annotated[tuple[Text, ...], Length(at_most=1000)] = ("<|endoftext|>",)
    """Special tokens, with the ids from 0 upward. One of them ends documents."""
    max_bytes: Tokens | None = None
    """Train on a sample of whole documents with at most this many bytes, selected by a text
    hash; by default on all documents."""
    text_field: Text = "text"
    """Field, column or feature with the text."""
    on_missing: Treatment = "refuse"
    """Whether a null text or a missing field is an error, or is skipped."""
    on_invalid: Treatment = "refuse"
    """Whether a row that cannot be read is an error, or is skipped."""
