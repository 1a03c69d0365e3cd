"""A part's documents as shards, in a worker process."""

import functools
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from stackjax.data.config import PrepareConfig
from stackjax.data.document import Document, split_of_hash
from stackjax.data.documents import read_documents, reading_of
from stackjax.data.hashes import hash_document, write_hashes
from stackjax.data.manifest import SplitName
from stackjax.data.part_counts import PartCounts
from stackjax.data.part_record import (
    WrittenPart,
    WrittenSplit,
    hashes_file,
    stem,
    write_record,
)
from stackjax.data.parts import Part
from stackjax.data.piece import Piece
from stackjax.data.shards import ShardsOfPart, token_dtype, write_shards
from stackjax.data.text_field import LeftOut, Reading
from stackjax.files.storage import sync_file
from stackjax.runtime.errors import UserError
from stackjax.tokenizer.special_tokens import read_tokenizer
from stackjax.tokenizer.tokenizer import Tokenizer


def write_part(config: PrepareConfig, digest: str, directory: Path, part: Part) -> int:
    """Tokenizes a part, writes its files and its record; returns the bytes of its shards.

    Args:
      digest: The tokenizer's digest.

    Raises:
      UserError: A document is refused.
      OSError: The disk is full, or memory is too small.
    """
    tokenizer, counts = _load_once(config.tokenizer, config.end_token, digest), PartCounts()
    # A killed run's last worker may still be writing for a moment, under its own name.
    temporary = directory / f"{stem(part.index)}-{os.getpid()}"
    reading = reading_of(config, tokenizer)
    contents = _read_part(part, reading, counts)
    documents = (
        _document(content, piece, token_dtype(tokenizer), config.validation_fraction)
        for piece, content in contents
    )
    try:
        shards = write_shards(documents, tokenizer, temporary, counts)
    except MemoryError as error:
        names = sorted({piece.source for piece in part.pieces})
        raise OSError(
            f"too little memory to read {names[0]!r} or one of {len(names) - 1} files after "
            f"it; try a smaller --num-processes, or cut large documents."
        ) from error
    written = _finish_files(directory, part.index, shards, counts)
    write_record(directory, part.index, written)
    return written.num_bytes


def _finish_files(
    directory: Path, index: int, shards: ShardsOfPart, counts: PartCounts
) -> WrittenPart:
    """Gives a part's shards their names, and writes the hashes."""
    splits: dict[SplitName, WrittenSplit] = {}
    for name, (shard, documents) in shards.items():
        named = shard.with_name(f"{stem(index)}.{name}")
        for source, final in zip(shard.files, named.files, strict=True):
            sync_file(directory / source)
            (directory / source).rename(directory / final)
        splits[name] = WrittenSplit(
            shard=named,
            documents=documents,
            hashes=write_hashes(directory / hashes_file(index, name), counts.hashes[name]),
        )
    return WrittenPart(splits=splits, inputs=counts.inputs())


def _read_part(
    part: Part, reading: Reading, counts: PartCounts
) -> Iterator[tuple[Piece, str | np.ndarray]]:
    """Yields all texts and tokens, and counts skipped rows."""
    for piece in part.pieces:
        counts.open(piece.source)
        for content in read_documents(piece, reading):
            if isinstance(content, LeftOut):
                counts.leave_out(piece.source, content.reason)
            else:
                yield piece, content


def _document(
    content: str | np.ndarray, piece: Piece, dtype: str, validation_fraction: float
) -> Document:
    is_text = isinstance(content, str)
    data = content.encode("utf-8") if is_text else content.astype(dtype).tobytes()
    number = hash_document(data)
    if piece.held_out is None:
        split = split_of_hash(number, validation_fraction)
    else:
        split = "validation" if piece.held_out else "train"
    return Document(
        split=split,
        content=content,
        hash=number,
        bytes=len(data),
        source=piece.source,
    )


@functools.cache
def _load_once(name: str, end_token: str | None, digest: str) -> Tokenizer:
    """Returns a tokenizer; UserError if the file no longer matches `digest`."""
    tokenizer = read_tokenizer(name, end_token)
    if tokenizer.digest != digest:
        raise UserError(f"tokenizer {name!r} has changed while in use; start again.")
    return tokenizer
