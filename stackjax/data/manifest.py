"""The manifest of a data set, `manifest.json`: tokenizer, token shards and hashes.

`prepare` writes the manifest last, so a directory with a manifest is complete.
"""

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from etils import epath

from stackjax.files.json_file import Fields, decode, hash_of, read_object, seal, unseal
from stackjax.files.paths import file_inside
from stackjax.runtime.errors import UserError
from stackjax.tokenizer.tokenizer_info import TokenizerInfo

MANIFEST = "manifest.json"
FORMAT = 3
RECORD_TOKENS = 2048
LENGTHS_SUFFIX = ".lengths"
LENGTH_DTYPE = np.dtype("<u4")
"""Dtype of document lengths on disk."""
_SEAL = "checksum"

SplitName = Literal["train", "validation"]
TokenDtype = Literal["uint16", "uint32"]
SPLITS: tuple[SplitName, ...] = ("train", "validation")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LengthsFile:
    """A file with the token count of each document in a shard, little-endian uint32."""

    file: str
    """File name within the directory."""
    bytes: int
    """File size in bytes."""
    hash: str
    """SHA-256 over the file."""

    @property
    def documents(self) -> int:
        """Number of documents."""
        return self.bytes // LENGTH_DTYPE.itemsize


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shard:
    """A file with part of a split's token stream."""

    file: str
    """File name within the directory."""
    bytes: int
    """File size in bytes."""
    records: int
    """Number of records."""
    tokens: int
    """Number of tokens."""
    hash: str
    """SHA-256 over all stored tokens."""
    ends: str
    """SHA-256 over the first and last record, checked when the set is opened."""
    lengths: LengthsFile
    """The document lengths, in stream order."""

    @property
    def files(self) -> tuple[str, str]:
        """The file names of the shard and the lengths."""
        return self.file, self.lengths.file

    def with_name(self, name: str) -> "Shard":
        """Returns the shard with another name of the file; that of the lengths follows."""
        lengths = dataclasses.replace(self.lengths, file=f"{name}{LENGTHS_SUFFIX}")
        return dataclasses.replace(self, file=name, lengths=lengths)

    @property
    def num_bytes(self) -> int:
        """Size of both files in bytes."""
        return self.bytes + self.lengths.bytes


@dataclasses.dataclass(frozen=True, kw_only=True)
class SideFile:
    """A file beside the shards."""

    file: str
    """File name within the directory."""
    bytes: int
    """File size in bytes."""
    sha256: str
    """SHA-256 of the file."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Split:
    """A token stream, such as `train`."""

    tokens: int
    """Number of tokens, with end tokens."""
    documents: int
    """Number of documents; each has an end token."""
    shards: tuple[Shard, ...]
    """The files, in stream order."""
    duplicates: int = 0
    """Documents whose hash occurred before in this split."""
    hashes: SideFile | None = None
    """The different document hashes, sorted, 8 bytes each; None if not counted."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """A data set: tokenizer, token dtype and splits."""

    format: int = FORMAT
    """Format version."""
    tokenizer: TokenizerInfo
    """The tokenizer."""
    dtype: TokenDtype
    """Dtype of stored tokens, little-endian."""
    record_tokens: int = RECORD_TOKENS
    """Tokens per record."""
    splits: dict[SplitName, Split]
    """The splits by name."""
    validation_fraction: float | None = None
    """The fraction of documents for validation; None if unknown."""
    hashed: Literal["text", "tokens"] = "text"
    """Content behind the document hashes."""
    shared_documents: int = 0
    """Different document hashes in both splits."""
    left_out: dict[str, int] = dataclasses.field(default_factory=dict)
    """Rows, documents and files of the inputs outside the data set, by reason."""
    inputs: SideFile | None = None
    """The counts by input file; None if not counted."""

    @property
    def files(self) -> list[str]:
        """All file names, without the manifest and the tokenizer."""
        shards = [shard for split in self.splits.values() for shard in split.shards]
        sides = [*(split.hashes for split in self.splits.values()), self.inputs]
        names = [file for shard in shards for file in shard.files]
        return names + [side.file for side in sides if side is not None]

    @property
    def digest(self) -> str:
        """A content hash over the tokenizer and all tokens, in order.

        Data sets with the same digest give identical training runs.
        """
        splits = {
            name: [split.tokens, *((shard.tokens, shard.hash) for shard in split.shards)]
            for name, split in self.splits.items()
        }
        info = self.tokenizer
        fields = [info.digest, info.begin_ids, info.end_id, self.dtype, splits]
        return hash_of(fields)


def data_digest(manifests: Sequence[Manifest]) -> str:
    """Returns a content hash over all sources, in order."""
    digests = [manifest.digest for manifest in manifests]
    return digests[0] if len(digests) == 1 else hash_of(digests)


def read_manifest(path: str) -> Manifest:
    """Returns the manifest in a directory.

    Raises:
      UserError: The manifest is missing, damaged or inconsistent.
    """
    file = epath.Path(path) / MANIFEST
    if not file.exists():
        raise UserError(
            f"{path!r} has no {MANIFEST}, so it is not a complete set of token shards; "
            f"make one: python -m stackjax.prepare INPUT... {path} --tokenizer NAME."
        )
    manifest = read_object(file, again(path), _from_fields)
    for name in manifest.files:
        file_inside(path, name, str(file))
    return manifest


def _from_fields(fields: Fields) -> Manifest:
    if fields.get("format") != FORMAT or type(fields["format"]) is not int:
        raise UserError(f"format is {fields.get('format')!r:.60}, not {FORMAT}")
    manifest = decode(Manifest, unseal(fields, _SEAL))
    for fault in _faults(manifest):
        raise UserError(fault)
    return manifest


def write_manifest(path: str, manifest: Manifest) -> None:
    """Writes the manifest into a directory."""
    (epath.Path(path) / MANIFEST).write_text(sealed(dataclasses.asdict(manifest)))


def sealed(fields: Mapping[str, Any]) -> str:
    """Returns the manifest text for these fields, with a checksum."""
    return json.dumps(seal(fields, _SEAL), indent=2) + "\n"


def again(path: str) -> str:
    """Returns the remedy for a damaged data set, for error messages."""
    return f"remove {path!r} and prepare it again with python -m stackjax.prepare"


def _faults(manifest: Manifest) -> Iterator[str]:
    """Yields inconsistencies between the numbers in a manifest."""
    info, num_bytes = manifest.tokenizer, np.dtype(manifest.dtype).itemsize
    # Batches store tokens as int32.
    if not 1 <= info.vocab_size <= 2 ** min(8 * num_bytes, 31):
        yield f"tokenizer.vocab_size is {info.vocab_size}, too few or many for {manifest.dtype}"
    if not 0 <= info.end_id < info.vocab_size:
        yield f"tokenizer.end_id is {info.end_id}, outside 0..{info.vocab_size - 1}"
    if manifest.record_tokens < 1:
        yield f"record_tokens is {manifest.record_tokens}, less than 1"
    if not manifest.splits:
        yield "splits is empty"
    for name, split in manifest.splits.items():
        if split.tokens != sum(shard.tokens for shard in split.shards):
            yield f"splits.{name}.tokens is {split.tokens}, not the sum over its shards"
        if not 0 <= split.documents <= split.tokens:
            yield f"splits.{name}.documents is {split.documents}, outside 0..{split.tokens}"
        if not 0 <= split.duplicates <= split.documents:
            yield f"splits.{name}.duplicates is {split.duplicates}, more than the documents"
        size = 8 * (split.documents - split.duplicates)
        if split.hashes is not None and split.hashes.bytes != size:
            yield f"splits.{name}.hashes has {split.hashes.bytes} bytes, not {size}"
        for shard in split.shards:
            for fault in _faults_of_shard(shard, manifest.record_tokens, num_bytes):
                yield f"shard {shard.file[:60]!r} of split {name!r} has {fault}"
        if split.documents != sum(shard.lengths.documents for shard in split.shards):
            yield f"splits.{name}.documents is {split.documents}, not the number of lengths"
    if not 0 <= (manifest.validation_fraction or 0) < 1:
        yield f"validation_fraction is {manifest.validation_fraction}, outside 0..1"
    if min(manifest.left_out.values(), default=0) < 0:
        yield "left_out has a negative count"
    sides = [split.hashes for split in manifest.splits.values()] + [manifest.inputs]
    for side in filter(None, sides):
        if side.bytes < 0 or "/" in side.file or not re.fullmatch("[0-9a-f]{64}", side.sha256):
            yield f"file {side.file[:60]!r} has an invalid name, size or hash"
    if len({MANIFEST, *manifest.files}) <= len(manifest.files):
        yield "two files have the same name"


def _faults_of_shard(shard: Shard, record_tokens: int, num_bytes: int) -> Iterator[str]:
    if not 1 <= shard.tokens <= shard.bytes // num_bytes:
        yield f"{shard.tokens} tokens in {shard.bytes} bytes"
    elif shard.records != -(-shard.tokens // record_tokens):
        yield f"{shard.tokens} tokens in {shard.records} records"
    if not 1 <= shard.lengths.documents <= shard.tokens:
        yield f"{shard.lengths.documents} document lengths for {shard.tokens} tokens"
    if shard.lengths.bytes % LENGTH_DTYPE.itemsize:
        yield f"document lengths in {shard.lengths.bytes} bytes"
    if "/" in "".join(shard.files):
        yield "a name with a slash"
    hashes = shard.hash, shard.ends, shard.lengths.hash
    if not all(re.fullmatch("[0-9a-f]{64}", text) for text in hashes):
        yield "an invalid hash"
