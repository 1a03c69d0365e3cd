"""Documents of a split as examples, without reading the others."""

import bisect
import dataclasses
import itertools

from etils import epath

from stackjax.data.lengths import read_lengths
from stackjax.data.manifest import SplitName, again
from stackjax.data.sources import TokenSource, check_place

HEAD, TAIL = 160, 16
"""Tokens shown at the beginning and at the end of a document."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Example:
    """A document; the middle of a long one is left out."""

    document: int
    """Number in the split, from 0."""
    tokens: int
    """Number of tokens, with special tokens."""
    head: tuple[int, ...]
    """The first tokens."""
    tail: tuple[int, ...]
    """The last tokens; empty if `head` has all."""

    @property
    def left_out(self) -> int:
        """Number of tokens between head and tail."""
        return self.tokens - len(self.head) - len(self.tail)


def example_documents(path: str, split: SplitName, count: int) -> list[Example]:
    """Returns documents in the middles of `count` equal parts of a split.

    Raises:
      UserError: The split is damaged, or in a bucket other than gs://.
      OSError: A record is damaged.
    """
    check_place(path, "give --examples 0, or copy the data to a disk first")
    source = TokenSource(path, split, seq_len=1)
    total = source.manifest.splits[split].documents
    count = min(count, total)
    return [_read(source, (2 * i + 1) * total // (2 * count)) for i in range(count)]


def _read(source: TokenSource, document: int) -> Example:
    shards = source.manifest.splits[source.split].shards
    ends = list(itertools.accumulate(shard.lengths.documents for shard in shards))
    index = bisect.bisect_right(ends, document)
    shard = shards[index]
    file = epath.Path(source.path) / shard.lengths.file
    lengths = read_lengths(file, shard, again(source.path))
    row = document - (ends[index] - shard.lengths.documents)
    earlier = sum(each.tokens for each in shards[:index])
    start, length = earlier + int(lengths[:row].sum(dtype=int)), int(lengths[row])
    is_whole = length <= HEAD + TAIL
    head = source.read(start, length if is_whole else HEAD)
    tail = source.read(start + length - TAIL, 0 if is_whole else TAIL)
    return Example(
        document=document,
        tokens=length,
        head=tuple(head.tolist()),
        tail=tuple(tail.tolist()),
    )
