"""Data of a run, and the options of `prepare`."""

import dataclasses
from typing import Annotated, Literal

import tyro

from stackjax.data.text_field import Treatment
from stackjax.runtime.constraints import Checked
from stackjax.runtime.errors import UserError
from stackjax.runtime.numbers import Text
from stackjax.runtime.ranges import Real, Whole


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Training data, sequence length, and reading options."""

    path: Text
    """Directory with token shards from `python -m stackjax.prepare`, on a disk or in a bucket
    (`gs://`)."""
    cache_dir: Text | None = None
    """Local directory for copies, shared by all processes on a host; None reads shards directly
    from `path`."""
    seq_len: Annotated[int, Whole(at_least=2, at_most=2**24)]
    """Tokens in each sequence (T)."""
    corpus: Literal["stdlib"] | None = None
    """Built-in corpus, prepared at `path` if `path` does not exist."""
    mask_documents: bool = False
    """Whether attention and predictions stay within a document."""
    num_workers: Annotated[int, Whole(at_least=0, at_most=1000)] = 0
    """Grain worker processes; 0 reads in threads."""
    prefetch: Annotated[int, Whole(at_least=0, at_most=1000)] = 4
    """Batches to prefetch."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrepareConfig(Checked):
    """Turns text into token shards for training."""

    paths: Annotated[
        tuple[str, ...],
        tyro.conf.Positional,
        tyro.conf.arg(name="paths", metavar="INPUT... OUTPUT"),
    ]
    """The inputs, then the output directory. An input is tfds:NAME, or a file, directory or
    glob: .jsonl, .ndjson, .json (also with .gz or .zst), .parquet, .tar, tokens in .bin, or
    plain text with one document per file."""
    tokenizer: Text
    """`bytes`, a Hugging Face tokenizer.json, a SentencePiece .model, or a Hugging Face folder
    with a tokenizer."""
    text_field: Text = "text"
    """Field, column or feature with the text; dots lead into nested fields."""
    on_missing: Treatment = "refuse"
    """Whether a row with a null text, or without the field, is an error or skipped and
    counted."""
    on_invalid: Treatment = "refuse"
    """Whether an unreadable row, or the rest of a damaged file, is an error or skipped and
    counted."""
    validation_fraction: Annotated[float, Real(at_least=0, less_than=1)] = 0.005
    """Fraction of documents for validation, selected by a text hash. TFDS datasets with a
    validation split keep this split."""
    num_processes: Annotated[int, Whole(at_least=1, at_most=1000)] | None = None
    """Number of worker processes; by default one per core."""
    end_token: Text | None = None
    """Token after each document; by default a common end token in the vocabulary."""
    compare_with: tuple[Text, ...] = ()
    """Other data sets; the numbers of documents shared with each are printed."""

    @property
    def inputs(self) -> tuple[str, ...]:
        """The inputs."""
        return self.paths[:-1]

    @property
    def output(self) -> str:
        """The output directory."""
        return self.paths[-1]

    def __post_init__(self):
        super().__post_init__()
        if len(self.paths) < 2:
            raise UserError(
                f"the paths {self.paths} are too few; give at least one INPUT, and last "
                f"the OUTPUT."
            )
