"""A piece: documents for a single process."""

import dataclasses
import itertools
from typing import Literal

PIECE_BYTES = 2**24

Format = Literal["text", "jsonl", "compressed_jsonl", "parquet", "tfds"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Piece:
    """Documents for a single process."""

    format: Format
    """How `source` is read."""
    source: str
    """A file, or a TFDS dataset name."""
    start: int = 0
    """First byte (jsonl), row group (parquet) or example (tfds)."""
    stop: int = 0
    """The end, exclusive."""
    num_bytes: int
    """Approximate text size."""
    stamp: tuple[int, int] | None = None
    """Size and modification time when the file was listed."""
    tfds_split: str | None = None
    """TFDS split name."""
    held_out: bool | None = None
    """Whether the input itself holds these documents out; None if silent."""
    data_dir: str | None = None
    """TFDS directory; None is the usual default."""


def cut(length: int, num_bytes: int) -> list[tuple[int, int]]:
    """Returns ranges over `length` units, so that each has about `PIECE_BYTES`."""
    num_pieces = min(length, -(-num_bytes // PIECE_BYTES) or 1)
    bounds = [length * i // num_pieces for i in range(num_pieces + 1)] if length else []
    return list(itertools.pairwise(bounds))
