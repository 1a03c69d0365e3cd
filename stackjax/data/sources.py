"""Random access to the sequences in token shards (ArrayRecord files).

A data set is a directory with `manifest.json` and, for each split, consecutive shards. A record
has `record_tokens` little-endian tokens; the last record in a shard may be shorter. Shapes: T
tokens per sequence.
"""

import bisect
import copy
import itertools
from concurrent import futures
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader
from etils import epath

from stackjax.data.config import SINGLE
from stackjax.data.manifest import SplitName, again, read_manifest
from stackjax.data.shard_hash import hash_ends
from stackjax.files.storage import is_remote
from stackjax.runtime.errors import UserError

CHECKS_AT_A_TIME = 16


def check_place(path: str, way_out: str) -> None:
    """Raises UserError, with the way out, if shards cannot be read from a path's bucket."""
    if is_remote(path) and not path.startswith("gs://"):
        raise UserError(
            f"the data is in {path}, but shards are read only from disks and gs://; {way_out}."
        )


class TokenSource:
    """A Grain data source over a split's sequences.

    Sequence k has the tokens [k * T, (k + 1) * T) of the stream. Reading is thread-safe, and
    the source can be pickled for worker processes.
    """

    def __init__(
        self,
        path: str,
        split: SplitName,
        seq_len: int,
        *,
        name: str = SINGLE,
        remedy: str | None = None,
    ):
        """Opens a split and checks all files against the manifest.

        Args:
          seq_len: Tokens per sequence (T).
          name: The source's name in a mixture.
          remedy: Advice in errors about damaged shards; by default to prepare the data again.

        Raises:
          UserError: The data set is missing, damaged, or shorter than a sequence.
        """
        self.path = path
        self.name = name
        self.split: SplitName = split
        self.seq_len = seq_len
        self.remedy = remedy or again(path)
        self.manifest = read_manifest(path)
        if split not in self.manifest.splits:
            raise UserError(f"{path!r} has no split {split!r}; {again(path)}.")
        self._check_length()
        self._shards = self.manifest.splits[split].shards
        self._ends = list(itertools.accumulate(shard.tokens for shard in self._shards))
        self._dtype = np.dtype(self.manifest.dtype).newbyteorder("<")
        self._readers: dict[int, ArrayRecordReader] = {}
        # Buckets have a high latency, but serve many requests at the same time.
        with futures.ThreadPoolExecutor(CHECKS_AT_A_TIME) as pool:
            list(pool.map(self._check_shard, range(len(self._shards))))

    def __len__(self) -> int:
        """Returns the number of complete sequences."""
        return self.manifest.splits[self.split].tokens // self.seq_len

    def __getitem__(self, index: int) -> np.ndarray:
        """Returns a sequence, int32 [T].

        Raises:
          OSError: A record is damaged or has tokens outside the vocabulary.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"sequence {index} is outside 0..{len(self) - 1}.")
        return self.read(index * self.seq_len, self.seq_len)

    def read(self, offset: int, length: int) -> np.ndarray:
        """Returns the tokens [offset, offset + length) of the stream, int32.

        Raises:
          OSError: A record is damaged or has tokens outside the vocabulary.
        """
        found = np.empty(length, np.int32)
        filled = 0
        while filled < length:
            tokens = self._read_from(offset + filled)[: length - filled]
            found[filled : filled + len(tokens)] = tokens
            filled += len(tokens)
        return found

    def with_length(self, seq_len: int) -> "TokenSource":
        """Returns the same split as sequences of another length."""
        other = copy.copy(self)
        other.seq_len = seq_len
        other._check_length()
        return other

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_readers": {}}

    def _check_length(self) -> None:
        """Raises UserError if the split is shorter than a sequence."""
        num_tokens = self.manifest.splits[self.split].tokens
        if num_tokens < self.seq_len:
            raise UserError(
                f"split {self.split!r} of {self.path!r} has {num_tokens} tokens, fewer than "
                f"one sequence of {self.seq_len}; choose a shorter sequence, or prepare more "
                f"text{' or a larger --validation-fraction' * (self.split == 'validation')}."
            )

    def _file(self, index: int) -> epath.Path:
        return epath.Path(self.path) / self._shards[index].file

    def _check_shard(self, index: int) -> None:
        """Raises UserError if a shard does not match the manifest."""
        shard = self._shards[index]
        for entry in (shard, shard.lengths):
            file = epath.Path(self.path) / entry.file
            try:
                size = file.stat().length
            except FileNotFoundError as error:
                raise self._refused(file, "is missing") from error
            if size != entry.bytes:
                reason = f"has {size} bytes, not {entry.bytes} as in the manifest"
                raise self._refused(file, reason)
        records = self._reader(index).num_records()
        if records != shard.records:
            reason = f"has {records} readable records, not {shard.records} as in the manifest"
            raise self._refused(self._file(index), reason)
        first, last = (self._read_record(index, record) for record in (0, records - 1))
        if hash_ends(first, last) != shard.ends:
            raise self._refused(self._file(index), "has other tokens than in the manifest")

    def _reader(self, index: int) -> ArrayRecordReader:
        if index not in self._readers:
            reader = ArrayRecordReader(
                str(self._file(index)), options="readahead_buffer_size:0"
            )
            self._readers.setdefault(index, reader)  # Another thread may have been faster.
        return self._readers[index]

    def _read_from(self, offset: int) -> np.ndarray:
        """Returns the tokens from a stream offset to the end of the record."""
        index = bisect.bisect_right(self._ends, offset)
        shard = self._shards[index]
        offset -= self._ends[index] - shard.tokens
        record, skipped = divmod(offset, self.manifest.record_tokens)
        stop = min((record + 1) * self.manifest.record_tokens, shard.tokens)
        expected = stop - record * self.manifest.record_tokens
        data = self._read_record(index, record)
        if len(data) != expected * self._dtype.itemsize:
            raise self._damaged(index, record, f"it has {len(data)} bytes")
        tokens = np.frombuffer(data, self._dtype)
        if tokens.max() >= self.manifest.tokenizer.vocab_size:
            vocab_size = self.manifest.tokenizer.vocab_size
            reason = f"it has token {tokens.max()}, but the vocabulary has {vocab_size} tokens"
            raise self._damaged(index, record, reason)
        return tokens[skipped:]

    def _read_record(self, index: int, record: int) -> bytes:
        try:
            # A range is read in this thread; a list of indices wakes a thread pool, which
            # takes ten times as long.
            return self._reader(index).read(record, record + 1)[0]
        except RuntimeError as error:  # From ArrayRecord, for damaged records.
            raise self._damaged(index, record, str(error)) from error

    def _refused(self, file: epath.Path, reason: str) -> UserError:
        return UserError(f"shard file {str(file)!r} {reason}; {self.remedy}.")

    def _damaged(self, index: int, record: int, reason: str) -> OSError:
        return OSError(
            f"record {record} of shard {str(self._file(index))!r} cannot be read, or is "
            f"damaged: {reason}; {self.remedy}."
        )
