"""A run's sources of token sequences, opened and checked."""

import contextlib
from collections.abc import Sequence

from etils import epath

from stackjax.data.cache import local_copy
from stackjax.data.config import DataConfig, PrepareConfig, SourceConfig
from stackjax.data.manifest import MANIFEST, SplitName
from stackjax.data.packed_source import PackedSource
from stackjax.data.prepare import prepare
from stackjax.data.sources import TokenSource, check_place
from stackjax.files.storage import check_bucket
from stackjax.runtime.errors import UserError

Source = TokenSource | PackedSource
"""Random access to the sequences of a split."""


def open_train(
    config: DataConfig, vocab_size: int, seq_len: int | None = None
) -> tuple[Source, ...]:
    """Returns the training sequences of every source, packed as the config says.

    Arguments and errors are those of `open_sources`.
    """
    sources = open_sources(config, "train", vocab_size, seq_len)
    return tuple(map(PackedSource, sources)) if config.packing == "best_fit" else sources


def open_sources(
    config: DataConfig, split: SplitName, vocab_size: int, seq_len: int | None = None
) -> tuple[TokenSource, ...]:
    """Returns a split of every source as a joined stream; prepares a missing built-in corpus.

    Args:
      vocab_size: The model's vocabulary size.
      seq_len: Tokens per sequence; by default the config's.

    Raises:
      UserError: A source is missing or damaged, has a larger vocabulary than the model or
        another tokenizer than the first source, or is the same data set as another one.
      OSError: A bucket is not usable, or copying to the cache failed.
    """
    if config.corpus is not None and config.path is not None:
        _prepare_corpus(config.path)
    sources = tuple(
        _open(config, source, split, seq_len or config.seq_len) for source in config.all_sources
    )
    for source in sources:
        _check_vocabulary(source, vocab_size)
        _check_alike(source, sources[0])
    _check_different(sources)
    return sources


def _prepare_corpus(path: str) -> None:
    check_bucket(path)
    if (epath.Path(path) / MANIFEST).exists():
        return
    # Another process may have prepared the same set in the meantime.
    with contextlib.suppress(FileExistsError):
        prepare(
            PrepareConfig(
                paths=("tfds:stackjax_stdlib", path), tokenizer="bytes", num_processes=1
            )
        )


def _open(
    config: DataConfig, source: SourceConfig, split: SplitName, seq_len: int
) -> TokenSource:
    path, remedy = source.path, None
    check_bucket(path)
    if config.cache_dir is not None:
        path = local_copy(path, split, config.cache_dir)
        remedy = f"remove {path!r} to copy it again from {source.path!r}"
    else:
        check_place(path, "give --data.cache-dir DIRECTORY to copy them to a disk first")
    return TokenSource(path, split, seq_len, name=source.name, remedy=remedy)


def _check_vocabulary(source: TokenSource, vocab_size: int) -> None:
    tokenizer = source.manifest.tokenizer
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"model.vocab_size is {vocab_size}, but the tokenizer {tokenizer.name!r} of "
            f"{source.path!r} has {tokenizer.vocab_size} tokens; "
            f"give --model.vocab-size {tokenizer.vocab_size}."
        )


def _check_alike(source: TokenSource, first: TokenSource) -> None:
    """Raises UserError if two sources have different tokens."""
    ours, theirs = source.manifest.tokenizer, first.manifest.tokenizer
    if (ours.digest, ours.begin_ids, ours.end_id) != (
        theirs.digest,
        theirs.begin_ids,
        theirs.end_id,
    ):
        raise UserError(
            f"the source {source.name!r} was prepared with the tokenizer {ours.name!r}, and "
            f"{first.name!r} with another, {theirs.name!r}; prepare all with the same one."
        )


def _check_different(sources: Sequence[TokenSource]) -> None:
    """Raises UserError if two sources are the same data set."""
    known: dict[str, TokenSource] = {}
    for source in sources:
        other = known.setdefault(source.manifest.digest, source)
        if other is not source:
            raise UserError(
                f"the sources {other.name!r} and {source.name!r} are the same data set, "
                f"{other.path!r} and {source.path!r}; name it once, with the sum of weights."
            )
