"""Pieces: an input is split into pieces, each with a range of documents."""

import dataclasses
import itertools
from typing import Literal

PIECE_BYTES = 2**24

Format = Literal[
    "text", "jsonl", "compressed_jsonl", "parquet", "tar", "token_stream", "megatron", "tfds"
]

TOKEN_FORMATS: tuple[Format, ...] = ("token_stream", "megatron")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """A range of documents in a single input."""

    format: Format
    """File format."""
    source: str
    """A file, or a TFDS dataset name."""
    input: str = ""
    """The INPUT on the command line, such as a glob."""
    start: int = 0
    """First byte (jsonl), row group (parquet), token (token_stream), document (megatron) or
    example (tfds)."""
    stop: int = 0
    """The end, exclusive."""
    num_bytes: int
    """Approximate text size in bytes."""
    stamp: tuple[int, ...] | None = None
    """File size and version at listing."""
    tfds_split: str | None = None
    """TFDS split name."""
    held_out: bool | None = None
    """Whether the documents are for validation; None lets their hashes decide."""
    data_dir: str | None = None
    """TFDS directory; None is the TFDS default."""


def cut(length: int, num_bytes: int) -> list[tuple[int, int]]:
    """Returns ranges over `length` units, each with about `PIECE_BYTES` bytes."""
    num_pieces = min(length, -(-num_bytes // PIECE_BYTES) or 1)
    bounds = [length * i // num_pieces for i in range(num_pieces + 1)] if length else []
    return list(itertools.pairwise(bounds))
