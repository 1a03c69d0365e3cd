"""The record of a finished part, written last: a part with a record is complete."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

from etils import epath

from stackjax.data.counts import InputCounts
from stackjax.data.hashes import DTYPE
from stackjax.data.manifest import Shard, SplitName
from stackjax.data.text_field import Reading
from stackjax.files.json_file import decode, parse_object, seal, unseal
from stackjax.files.storage import replace_text
from stackjax.runtime.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class WrittenSplit:
    """The documents of a part in one split."""

    shard: Shard
    """The shard."""
    documents: int
    """Number of documents."""
    hashes: int
    """Number of different document hashes."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class WrittenPart:
    """A finished part."""

    splits: dict[SplitName, WrittenSplit]
    """The shards by split; splits without documents are absent."""
    inputs: tuple[InputCounts, ...]
    """Counts by input file, in order."""

    @property
    def num_bytes(self) -> int:
        """Total shard size in bytes."""
        return sum(written.shard.num_bytes for written in self.splits.values())


def stem(index: int) -> str:
    """Returns the name of a part's files, without suffix."""
    return f"part{index:05d}"


def hashes_file(index: int, split: SplitName) -> str:
    """Returns the name of the file with a part's document hashes."""
    return f"{stem(index)}.{split}.hashes"


def write_record(directory: Path, index: int, part: WrittenPart) -> None:
    """Writes a part's record, atomically."""
    text = json.dumps(seal(dataclasses.asdict(part))) + "\n"
    replace_text(epath.Path(directory / f"{stem(index)}.json"), text)


def read_record(directory: Path, index: int) -> WrittenPart | None:
    """Returns a part's record; None if absent or damaged."""
    try:
        data = (directory / f"{stem(index)}.json").read_bytes()
        return decode(WrittenPart, unseal(parse_object(data)))
    except (FileNotFoundError, UserError):
        return None


def finished_parts(directory: Path, num_parts: int, reading: Reading) -> list[int]:
    """Returns the indices of all finished parts that are as `reading` asks.

    A part without rows of a kind is the same, whether such rows are refused or skipped.
    """
    return [
        index
        for index in range(num_parts)
        if (part := read_record(directory, index)) is not None
        and all(_is_complete(path, size) for path, size in _files(directory, index, part))
        and not _has_refused_rows(part, reading)
    ]


def _files(directory: Path, index: int, part: WrittenPart) -> Iterator[tuple[Path, int]]:
    """Yields a part's files and their sizes in bytes."""
    for name, written in part.splits.items():
        shard = written.shard
        yield directory / shard.file, shard.bytes
        yield directory / shard.lengths.file, shard.lengths.bytes
        yield directory / hashes_file(index, name), DTYPE.itemsize * written.hashes


def _is_complete(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def _has_refused_rows(part: WrittenPart, reading: Reading) -> bool:
    reasons = {reason for counts in part.inputs for reason in counts.left_out}
    return any(reading.is_refused(reason) for reason in reasons)
