"""The manifest, `manifest.json`, describes a set: tokenizer, token shards and their hashes.

Writers add the file last, so its presence means a complete set.
"""

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import numpy as np
from etils import epath

from stackjax.files.json_file import Fields, decode, hash_of, read_object, seal, unseal
from stackjax.files.paths import file_inside
from stackjax.runtime.errors import UserError
from stackjax.tokenizer.tokenizer_info import TokenizerInfo

MANIFEST = "manifest.json"
FORMAT = 2
RECORD_TOKENS = 2048
_SEAL = "checksum"

SplitName = Literal["train", "validation"]
TokenDtype = Literal["uint16", "uint32"]
SPLITS: tuple[SplitName, ...] = ("train", "validation")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shard:
    """A file with part of a stream."""

    file: str
    """File name within the directory."""
    bytes: int
    """File size."""
    records: int
    """How many records there are."""
    tokens: int
    """Tokens in all records."""
    hash: str
    """SHA-256 over all stored tokens."""
    ends: str
    """SHA-256 over the first and the last record; opening the set checks this."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Split:
    """A stream, such as `train`."""

    tokens: int
    """Tokens in all shards, end tokens included."""
    documents: int
    """Documents in all shards; each has an end token."""
    shards: tuple[Shard, ...]
    """The files, in stream order."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """A set: tokenizer, token type and streams."""

    format: int = FORMAT
    """Layout version."""
    tokenizer: TokenizerInfo
    """The tokenizer behind the set."""
    dtype: TokenDtype
    """Type in the files, little-endian."""
    record_tokens: int = RECORD_TOKENS
    """Tokens in each record."""
    splits: dict[SplitName, Split]
    """The streams by name."""

    @property
    def files(self) -> list[str]:
        """All shard names."""
        return [shard.file for split in self.splits.values() for shard in split.shards]

    @property
    def digest(self) -> str:
        """A content hash: all tokens in order, and the tokenizer.

        Sets with equal digests train alike, in any directory.
        """
        splits = {
            name: [split.tokens, *((shard.tokens, shard.hash) for shard in split.shards)]
            for name, split in self.splits.items()
        }
        info = self.tokenizer
        fields = [info.digest, info.begin_ids, info.end_id, self.dtype, splits]
        return hash_of(fields)


def read_manifest(path: str) -> Manifest:
    """Returns the manifest in a directory.

    Raises:
      UserError: The manifest is absent, damaged or contradictory.
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
    """Returns the way out when a set is damaged."""
    return f"remove {path!r} and prepare it again with python -m stackjax.prepare"


def _faults(manifest: Manifest) -> Iterator[str]:
    """Yields contradictions between the numbers in a manifest."""
    info, num_bytes = manifest.tokenizer, np.dtype(manifest.dtype).itemsize
    # Batches hold tokens as int32.
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
        for shard in split.shards:
            for fault in _faults_of_shard(shard, manifest.record_tokens, num_bytes):
                yield f"shard {shard.file[:60]!r} of split {name!r} has {fault}"
    if len({MANIFEST, *manifest.files}) <= len(manifest.files):
        yield "two shards have the same file"


def _faults_of_shard(shard: Shard, record_tokens: int, num_bytes: int) -> Iterator[str]:
    if not 1 <= shard.tokens <= shard.bytes // num_bytes:
        yield f"{shard.tokens} tokens in {shard.bytes} bytes"
    elif shard.records != -(-shard.tokens // record_tokens):
        yield f"{shard.tokens} tokens in {shard.records} records"
    if "/" in shard.file:
        yield "a name with a slash"
    if not all(re.fullmatch("[0-9a-f]{64}", text) for text in (shard.hash, shard.ends)):
        yield "a hash that is none"
