"""Data of a run, and the options of `prepare`."""

import dataclasses
import re
from collections.abc import Sequence
from typing import Annotated, Literal

import tyro

from stackjax.data.text_field import Treatment
from stackjax.runtime.constraints import Checked, OnlyWith
from stackjax.runtime.errors import UserError
from stackjax.runtime.numbers import NonNegative, Positive, Text
from stackjax.runtime.ranges import Length, Real, Whole

SeqLen = Annotated[int, Whole(at_least=2, at_most=2**24)]
"""Tokens in a sequence."""
SINGLE = "data"
"""Name of the source of a run without a mixture."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """A source in a mixture."""

    name: Text
    """Name in metrics: letters, digits, `_`, `-` and `.`."""
    path: Text
    """Directory with token shards, on a disk or in a bucket (`gs://`)."""
    weight: NonNegative = 1.0
    """Share of examples, relative to the other sources, in stages without own weights; also the
    source's weight in the mean validation loss."""
    max_epochs: Positive | None = None
    """Refuse to start a run that reads the source more often than this."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Training data, sequence length, and reading options."""

    path: Text | None = None
    """Directory with token shards from `python -m stackjax.prepare`, on a disk or in a bucket
    (`gs://`)."""
    sources: Annotated[tuple[SourceConfig, ...], Length(at_least=0, at_most=1000)] = ()
    """Sources of a mixture, in place of `path`. All need the same tokenizer."""
    max_epochs: Annotated[Positive | None, OnlyWith("path")] = None
    """Refuse to start a run that reads the data more often than this."""
    cache_dir: Text | None = None
    """Local directory for copies, shared by all processes on a host; None reads shards directly
    from `path`."""
    seq_len: SeqLen
    """Tokens in each sequence (T), in stages without an own length."""
    corpus: Annotated[Literal["stdlib"] | None, OnlyWith("path")] = None
    """Built-in corpus, prepared at `path` if `path` does not exist."""
    mask_documents: bool = False
    """Whether attention and predictions stay within a document."""
    packing: Literal["joined", "best_fit"] = "joined"
    """Whether training sequences are cut from the joined stream, or have whole documents,
    packed by best fit, and padding. Validation sequences are always joined."""
    num_workers: Annotated[int, Whole(at_least=0, at_most=1000)] = 0
    """Grain worker processes; 0 reads in threads."""
    prefetch: Annotated[int, Whole(at_least=0, at_most=1000)] = 4
    """Batches to prefetch."""

    @property
    def all_sources(self) -> tuple[SourceConfig, ...]:
        """The sources; a single one if `path` is set."""
        if self.path is None:
            return self.sources
        return (SourceConfig(name=SINGLE, path=self.path, max_epochs=self.max_epochs),)


def check_sources(config: DataConfig) -> None:
    """Raises UserError if the sources are missing or contradict each other."""
    if (config.path is None) == (not config.sources):
        raise UserError(
            f"data.path is {config.path!r} and data.sources has {len(config.sources)} sources; "
            f"give either a path or sources."
        )
    names = [source.name for source in config.all_sources]
    for index, name in enumerate(names):
        if not re.fullmatch(r"[\w.-]+", name, re.ASCII):
            raise UserError(
                f"data.sources.{index}.name is {name!r}; it may have letters, digits, `_`, `-` "
                f"and `.`."
            )
        if name in names[:index]:
            raise UserError(f"data.sources.{index}.name is {name!r}, as of another source.")
        if name.endswith("_before") and name.removesuffix("_before") in names:
            raise UserError(
                f"data.sources.{index}.name is {name!r}, which is the name of another source's "
                f"loss before growth; choose another name."
            )
    weights = [source.weight for source in config.all_sources]
    check_weights(weights, len(names), "the weight of data.sources")


def check_weights(weights: Sequence[float], num_sources: int, field: str) -> None:
    """Raises UserError if weights do not fit the sources."""
    if len(weights) != num_sources:
        raise UserError(
            f"{field} has {len(weights)} weights, but the data has {num_sources} sources; give "
            f"one weight for each source."
        )
    if not sum(weights) > 0:
        raise UserError(f"{field} is {tuple(weights)}; at least one must be more than 0.")


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
