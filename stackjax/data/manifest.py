"""The manifest of a set of token shards: its tokenizer, its streams, and their hashes.

`manifest.json` is written last, so that its presence says that the set is complete.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
from etils import epath

from stackjax.errors import UserError
from stackjax.runtime.json_fields import from_json
from stackjax.runtime.paths import file_inside

MANIFEST = "manifest.json"
FORMAT = 2
RECORD_TOKENS = 2048

SplitName = Literal["train", "validation"]
TokenDtype = Literal["uint16", "uint32"]
SPLITS: tuple[SplitName, ...] = ("train", "validation")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shard:
    """One file of a stream."""

    file: str
    """Name within the directory of the set."""
    bytes: int
    """Size of the file."""
    records: int
    """Number of records."""
    tokens: int
    """Number of tokens in all records."""
    hash: str
    """SHA-256 of all tokens, as they are stored."""
    ends: str
    """SHA-256 of the first and the last record; checked whenever the set is opened."""


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
class TokenizerInfo:
    """The tokenizer that wrote a set."""

    name: str
    """`bytes`, or the path it was loaded from."""
    digest: str
    """SHA-256 of what defines it."""
    vocab_size: int
    """Number of tokens; every token is below it."""
    end_id: int
    """The token that ends each document."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything that is known about a set of token shards."""

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
    def files(self) -> list[str]:
        """Names of all shards."""
        return [shard.file for split in self.splits.values() for shard in split.shards]

    @property
    def digest(self) -> str:
        """A hash of the content: of all tokens in their order, and of the tokenizer.

        Sets with the same digest train the same, wherever they lie.
        """
        splits = {
            name: [split.tokens, *((shard.tokens, shard.hash) for shard in split.shards)]
            for name, split in self.splits.items()
        }
        fields = [self.tokenizer.digest, self.tokenizer.end_id, self.dtype, splits]
        return _hash_of_json(fields)


def read_manifest(path: str) -> Manifest:
    """Returns the manifest of the set of token shards in a directory.

    Raises:
      UserError: There is none, it is damaged, or it contradicts itself.
    """
    file = epath.Path(path) / MANIFEST
    try:
        fields = json.loads(file.read_bytes())
        checksum = fields.pop("checksum", None) if isinstance(fields, dict) else None
        is_whole = checksum == _hash_of_json(fields)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(
            f"{path!r} has no {MANIFEST}, so it is not a complete set of token shards; "
            f"make one: python -m stackjax.prepare INPUT... {path} --tokenizer NAME"
        ) from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{str(file)!r} is not JSON ({error}); {again(path)}") from error
    if not isinstance(fields, dict) or fields.get("format") != FORMAT:
        raise UserError(f"{str(file)!r} is not of format {FORMAT}; {again(path)}")
    if not is_whole:
        raise UserError(f"{str(file)!r} is damaged: its checksum is wrong; {again(path)}")
    try:
        manifest = from_json(Manifest, fields)
    except UserError as error:
        raise UserError(f"{str(file)!r} is no manifest: {error}; {again(path)}") from error
    for fault in _faults(manifest):
        raise UserError(f"{str(file)!r} contradicts itself: {fault}; {again(path)}")
    for name in manifest.files:
        file_inside(path, name, str(file))
    return manifest


def write_manifest(path: str, manifest: Manifest) -> None:
    """Writes the manifest into the directory of a set."""
    (epath.Path(path) / MANIFEST).write_text(sealed(dataclasses.asdict(manifest)))


def sealed(fields: dict[str, Any]) -> str:
    """Returns the text of a manifest with these fields, and with their checksum."""
    fields = json.loads(json.dumps(fields))
    fields["checksum"] = _hash_of_json(fields)
    return json.dumps(fields, indent=2) + "\n"


def again(path: str) -> str:
    """Returns the way out when a set is damaged."""
    return f"remove {path!r} and prepare it again with python -m stackjax.prepare."


def _hash_of_json(fields: object) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def _faults(manifest: Manifest) -> Iterator[str]:
    """Yields the reasons why the numbers of a manifest cannot all be true."""
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
