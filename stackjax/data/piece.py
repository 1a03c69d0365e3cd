"""A piece of an input: documents that one process reads alone."""

import dataclasses
import itertools
from typing import Literal

PIECE_BYTES = 2**24

Format = Literal["text", "jsonl", "compressed_jsonl", "parquet", "tfds"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Piece:
    """Documents that one process reads alone."""

    format: Format
    """How `source` is read."""
    source: str
    """A file, or the name of a TFDS dataset."""
    start: int = 0
    """First byte (jsonl), row group (parquet) or example (tfds)."""
    stop: int = 0
    """One past the last."""
    num_bytes: int
    """Approximate size of the text."""
    stamp: tuple[int, int] | None = None
    """Size and time of change of the file when it was listed."""
    tfds_split: str | None = None
    """Split of the TFDS dataset."""
    held_out: bool | None = None
    """Whether the input itself says that these documents are held out; None if silent."""
    data_dir: str | None = None
    """Directory of the TFDS dataset; None is its own default."""


def cut(length: int, num_bytes: int) -> list[tuple[int, int]]:
    """Returns the ranges that cut `length` units of `num_bytes` into whole pieces."""
    num_pieces = min(length, -(-num_bytes // PIECE_BYTES) or 1)
    bounds = [length * i // num_pieces for i in range(num_pieces + 1)] if length else []
    return list(itertools.pairwise(bounds))
