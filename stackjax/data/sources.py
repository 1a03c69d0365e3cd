"""Token shards: ArrayRecord files whose tokens form one stream, read at random.

A set is a directory with `manifest.json` and, for each split, shards that follow each
other in the stream. A record holds `record_tokens` tokens, little-endian; only the last
one of a shard may be shorter. Shape letters: T tokens of a sequence.
"""

import bisect
import dataclasses
import hashlib
import itertools
import json
from concurrent import futures
from typing import Any, Literal

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader
from etils import epath

from stackjax.data.tokenizer_info import TokenizerInfo
from stackjax.errors import UserError

MANIFEST = "manifest.json"
FORMAT = 1
RECORD_TOKENS = 2048
CHECKS_AT_A_TIME = 16

SplitName = Literal["train", "validation"]
TokenDtype = Literal["uint16", "uint32"]
SPLITS: tuple[SplitName, ...] = ("train", "validation")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shard:
    """What the manifest knows of one file."""

    file: str
    """Name within the directory of the set."""
    bytes: int
    """Size of the file."""
    records: int
    """Number of records."""
    tokens: int
    """Number of tokens in all records."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Split:
    """The stream of one split."""

    tokens: int
    """Tokens in all shards, end tokens included."""
    documents: int
    """Documents in all shards; each has one end token."""
    shards: tuple[Shard, ...]
    """The files, in the order of the stream."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a set of token shards is; written last, so that its presence says complete."""

    format: int = FORMAT
    """Version of the layout."""
    tokenizer: TokenizerInfo
    """The tokenizer that wrote the set."""
    dtype: TokenDtype
    """Type of the stored tokens, little-endian."""
    record_tokens: int = RECORD_TOKENS
    """Tokens in each record."""
    splits: dict[SplitName, Split]
    """The stream of each split."""

    @property
    def digest(self) -> str:
        """A hash that tells sets apart by their tokenizer and the sizes of their shards."""
        splits = {name: dataclasses.asdict(split) for name, split in self.splits.items()}
        text = json.dumps([self.tokenizer.digest, self.dtype, splits], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def read_manifest(path: str) -> Manifest:
    """Returns the manifest of the set of token shards in a directory.

    Raises:
      UserError: There is none, or it is not one of ours.
    """
    file = epath.Path(path) / MANIFEST
    try:
        fields = json.loads(file.read_text())
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(
            f"{path!r} has no {MANIFEST}, so it is not a complete set of token shards; "
            f"make one: python -m stackjax.prepare INPUT... {path} --tokenizer NAME"
        ) from error
    except ValueError as error:
        raise UserError(f"{str(file)!r} is not JSON ({error}); {_again(path)}") from error
    if not isinstance(fields, dict) or fields.get("format") != FORMAT:
        raise UserError(f"{str(file)!r} is not of format {FORMAT}; {_again(path)}")
    try:
        return _manifest_from_json(fields)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{str(file)!r} lacks or misnames a field ({error}); {_again(path)}"
        ) from error


def write_manifest(path: str, manifest: Manifest) -> None:
    """Writes the manifest into the directory of a set."""
    text = json.dumps(dataclasses.asdict(manifest), indent=2) + "\n"
    (epath.Path(path) / MANIFEST).write_text(text)


def _manifest_from_json(fields: dict[str, Any]) -> Manifest:
    splits = {
        name: Split(**{**split, "shards": tuple(Shard(**s) for s in split["shards"])})
        for name, split in fields["splits"].items()
    }
    tokenizer = TokenizerInfo(**fields["tokenizer"])
    return Manifest(**{**fields, "tokenizer": tokenizer, "splits": splits})


def _again(path: str) -> str:
    return f"remove {path!r} and prepare it again with python -m stackjax.prepare."


class TokenSource:
    """Sequences of `seq_len` tokens of one split: a random-access source for Grain.

    Sequence k is tokens [k * T, (k + 1) * T) of the split's stream. Safe to read from
    threads, and to pickle for worker processes.
    """

    def __init__(self, path: str, split: SplitName, seq_len: int):
        """Opens a split and checks its files against the manifest.

        Raises:
          UserError: The set is missing, damaged, or too short for one sequence.
        """
        self.path = path
        self.split: SplitName = split
        self.seq_len = seq_len
        self.manifest = read_manifest(path)
        if split not in self.manifest.splits:
            raise UserError(f"{path!r} has no split {split!r}; {_again(path)}")
        stream = self.manifest.splits[split]
        if stream.tokens < seq_len:
            raise UserError(
                f"split {split!r} of {path!r} has {stream.tokens} tokens, fewer than one "
                f"sequence of {seq_len}; choose a shorter sequence, or prepare more text"
                f"{' or a larger --validation-fraction' * (split == 'validation')}."
            )
        self._shards = stream.shards
        self._ends = list(itertools.accumulate(shard.tokens for shard in self._shards))
        self._dtype = np.dtype(self.manifest.dtype).newbyteorder("<")
        self._readers: dict[int, ArrayRecordReader] = {}
        # A bucket answers late, but many questions at a time.
        with futures.ThreadPoolExecutor(CHECKS_AT_A_TIME) as pool:
            list(pool.map(self._check_shard, range(len(self._shards))))

    def __len__(self) -> int:
        """Returns the number of sequences; a shorter rest of the stream is left out."""
        return self.manifest.splits[self.split].tokens // self.seq_len

    def __getitem__(self, index: int) -> np.ndarray:
        """Returns one sequence, int32 `[T]`.

        Raises:
          OSError: A record that it spans cannot be read.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"sequence {index} is outside 0..{len(self) - 1}.")
        tokens_T = np.empty(self.seq_len, np.int32)
        filled = 0
        while filled < self.seq_len:
            tokens = self._read_from(index * self.seq_len + filled)
            tokens = tokens[: self.seq_len - filled]
            tokens_T[filled : filled + len(tokens)] = tokens
            filled += len(tokens)
        return tokens_T

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_readers": {}}

    def _file(self, index: int) -> epath.Path:
        return epath.Path(self.path) / self._shards[index].file

    def _check_shard(self, index: int) -> None:
        """Raises UserError where a shard is not what the manifest says."""
        shard, file = self._shards[index], self._file(index)
        try:
            size = file.stat().length
        except FileNotFoundError as error:
            raise UserError(f"shard {str(file)!r} is missing; {_again(self.path)}") from error
        if size != shard.bytes:
            raise UserError(
                f"shard {str(file)!r} has {size} bytes where the manifest says "
                f"{shard.bytes}; {_again(self.path)}"
            )
        records = self._reader(index).num_records()
        if records != shard.records:
            raise UserError(
                f"shard {str(file)!r} has {records} readable records where the manifest "
                f"says {shard.records}; {_again(self.path)}"
            )

    def _reader(self, index: int) -> ArrayRecordReader:
        if index not in self._readers:
            reader = ArrayRecordReader(
                str(self._file(index)), options="readahead_buffer_size:0"
            )
            self._readers.setdefault(index, reader)  # another thread may have been quicker
        return self._readers[index]

    def _read_from(self, offset: int) -> np.ndarray:
        """Returns the tokens from an offset of the stream to the end of its record."""
        index = bisect.bisect_right(self._ends, offset)
        shard = self._shards[index]
        offset -= self._ends[index] - shard.tokens
        record, skipped = divmod(offset, self.manifest.record_tokens)
        stop = min((record + 1) * self.manifest.record_tokens, shard.tokens)
        expected = stop - record * self.manifest.record_tokens
        data = self._read_record(index, record)
        if len(data) != expected * self._dtype.itemsize:
            raise self._damaged(index, record, f"it has {len(data)} bytes")
        return np.frombuffer(data, self._dtype)[skipped:]

    def _read_record(self, index: int, record: int) -> bytes:
        try:
            return self._reader(index).read([record])[0]
        except RuntimeError as error:  # What ArrayRecord raises for a failed check.
            raise self._damaged(index, record, str(error)) from error

    def _damaged(self, index: int, record: int, reason: str) -> OSError:
        return OSError(
            f"record {record} of shard {str(self._file(index))!r} cannot be read, or is "
            f"damaged: {reason}; {_again(self.path)}"
        )
