"""Token shard writer."""

import contextlib
import itertools
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from stackjax.data import packing
from stackjax.data.document import Document
from stackjax.data.lengths import LengthsWriter
from stackjax.data.manifest import (
    LENGTHS_SUFFIX,
    RECORD_TOKENS,
    SPLITS,
    Shard,
    SplitName,
    TokenDtype,
)
from stackjax.data.part_counts import PartCounts
from stackjax.data.shard_hash import ShardHash
from stackjax.data.text_field import NO_TOKENS
from stackjax.runtime.errors import UserError
from stackjax.tokenizer.tokenizer import Tokenizer

DOCUMENTS_AT_A_TIME = 64

ShardsOfPart = dict[SplitName, tuple[Shard, int]]
"""A part's shard and number of documents, by split."""


class ShardWriter:
    """Writes a token stream as a shard, with the document lengths in a file beside it."""

    def __init__(self, path: Path, dtype: str):
        self._path = path
        self._dtype = np.dtype(dtype).newbyteorder("<")
        # One record per group makes random access cheap; tokens hardly compress.
        self._writer = ArrayRecordWriter(str(path), "group_size:1,uncompressed")
        self._rest = np.empty(0, self._dtype)
        self._records = self._tokens = 0
        self._hash = ShardHash()
        self._lengths = LengthsWriter(path.with_name(path.name + LENGTHS_SUFFIX))

    def write(self, tokens: np.ndarray, lengths: np.ndarray | None = None) -> None:
        """Appends documents to the stream.

        Args:
          tokens: The tokens of all documents.
          lengths: The token count of each document; None for a single document.

        Raises:
          UserError: A document is too long.
        """
        lengths = np.array([len(tokens)]) if lengths is None else lengths
        assert lengths.all() and lengths.sum() == len(tokens), "documents have tokens"
        self._lengths.write(lengths)
        stream = np.concatenate([self._rest, tokens.astype(self._dtype)])
        records, self._rest = packing.cut_records(stream, RECORD_TOKENS)
        for record in records:
            self._write_record(record)

    def close(self) -> Shard:
        """Writes the remaining tokens and returns the manifest entry."""
        if len(self._rest):
            self._write_record(self._rest)
        with _as_os_error(self._path):
            self._writer.close()
        return Shard(
            file=self._path.name,
            bytes=self._path.stat().st_size,
            records=self._records,
            tokens=self._tokens,
            hash=self._hash.digest(),
            ends=self._hash.ends_digest(),
            lengths=self._lengths.close(),
        )

    def _write_record(self, record: np.ndarray) -> None:
        data = record.tobytes()
        with _as_os_error(self._path):
            self._writer.write(data)
        self._hash.update(data)
        self._records += 1
        self._tokens += len(record)


@contextlib.contextmanager
def _as_os_error(path: Path) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # From ArrayRecord, on a full disk.
        raise OSError(f"cannot write {str(path)!r}: {error}") from error


def write_shards(
    documents: Iterator[Document], tokenizer: Tokenizer, stem: Path, counts: PartCounts
) -> ShardsOfPart:
    """Writes documents to a shard per split, named `stem.SPLIT`.

    Args:
      counts: Counts the documents, and those skipped for a lack of tokens.
    """
    writers: dict[SplitName, ShardWriter] = {}
    num_documents = Counter[SplitName]()
    for split, group in _group_by_split(documents):
        encoded = list(_encode_all(tokenizer, group, counts))
        if not encoded:
            continue
        if split not in writers:
            path = stem.with_suffix(f".{split}")
            writers[split] = ShardWriter(path, token_dtype(tokenizer))
        num_special = len(tokenizer.begin_ids) + 1
        writers[split].write(
            packing.join_documents(encoded, tokenizer.end_id, tokenizer.begin_ids),
            np.array([len(tokens) + num_special for tokens in encoded]),
        )
        num_documents[split] += len(encoded)
    return {split: (writer.close(), num_documents[split]) for split, writer in writers.items()}


def token_dtype(tokenizer: Tokenizer) -> TokenDtype:
    """Returns the smallest dtype for the vocabulary."""
    return "uint16" if tokenizer.vocab_size <= 2**16 else "uint32"


def _group_by_split(
    documents: Iterator[Document],
) -> Iterator[tuple[SplitName, list[Document]]]:
    """Yields documents in batches from the same split, in the order of each split."""
    while chunk := list(itertools.islice(documents, DOCUMENTS_AT_A_TIME)):
        for split in SPLITS:
            yield split, [document for document in chunk if document.split == split]


def _encode_all(
    tokenizer: Tokenizer, documents: list[Document], counts: PartCounts
) -> Iterator[np.ndarray]:
    """Yields the tokens of all documents with tokens."""
    for document in documents:
        tokens = _encode(tokenizer, document.content)
        if len(tokens):
            counts.add(document)
            yield tokens
        else:
            counts.leave_out(document.source, NO_TOKENS)


def _encode(tokenizer: Tokenizer, content: str | np.ndarray) -> np.ndarray:
    tokens = tokenizer.encode(content) if isinstance(content, str) else content
    if len(tokens) and tokens.max() >= tokenizer.vocab_size:
        raise UserError(
            f"tokenizer {tokenizer.name!r} gave token {tokens.max()}, which its "
            f"vocabulary of {tokenizer.vocab_size} does not have."
        )
    return tokens
