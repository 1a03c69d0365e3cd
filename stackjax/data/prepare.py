"""Conversion of text to token shards.

The inputs are split into parts, and each part becomes a shard per split. The shards depend only
on the inputs, not on `num_processes`.
"""

import dataclasses
import functools
import hashlib
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from etils import epath

from stackjax.data.config import PrepareConfig
from stackjax.data.documents import list_pieces, read_documents
from stackjax.data.lengths import SUFFIX
from stackjax.data.manifest import MANIFEST, SPLITS, Manifest, Split, SplitName, write_manifest
from stackjax.data.parts import (
    Part,
    WrittenPart,
    group_pieces,
    show_progress,
    tell_listing,
    warn_if_disk_is_small,
)
from stackjax.data.shards import ShardsOfPart, token_dtype, write_shards
from stackjax.files.staging import refuse_existing, staging_directory, upload
from stackjax.files.storage import check_bucket, is_remote
from stackjax.runtime.errors import UserError
from stackjax.runtime.worker_pool import run_in_processes
from stackjax.tokenizer.special_tokens import read_tokenizer
from stackjax.tokenizer.tokenizer import Tokenizer
from stackjax.tokenizer.tokenizer_info import tokenizer_info, write_file


def prepare(config: PrepareConfig) -> Manifest:
    """Writes the inputs as token shards and returns the manifest.

    A staging directory is renamed to OUTPUT at the end, so OUTPUT is complete or absent. For a
    bucket, a temporary directory is uploaded at the end.

    Raises:
      FileExistsError: OUTPUT exists already.
      UserError: An input or the tokenizer is invalid.
      OSError: Reading or writing failed.
    """
    tokenizer = read_tokenizer(config.tokenizer, config.end_token)
    check_bucket(config.output)
    output = epath.Path(config.output)
    _check_not_a_file(config.output)
    refuse_existing(output)
    if is_remote(output):
        return _prepare_and_upload(config, output)
    with staging_directory(output) as staging:
        scratch = staging / "scratch"
        pieces = list_pieces(config.inputs, str(scratch), config.text_field, config.null_texts)
        parts = group_pieces(list(tell_listing(pieces)))
        written = _write_parts(config, tokenizer.digest, staging, parts)
        shutil.rmtree(scratch, ignore_errors=True)
        shards = [part.shards for part in written]
        manifest = _build_manifest(tokenizer, _join_results(shards, staging))
        write_file(tokenizer, epath.Path(staging))
        write_manifest(str(staging), manifest)
    for reason, count in sum((part.left_out for part in written), Counter()).items():
        print(f"left out: {count} {reason}")
    return manifest


def _check_not_a_file(output: str) -> None:
    if not is_remote(output) and Path(output).is_file():
        raise UserError(
            f"the last path, {output!r}, is the OUTPUT, but a file with this name exists "
            f"already; name a new directory last."
        )


def _prepare_and_upload(config: PrepareConfig, output: epath.Path) -> Manifest:
    with tempfile.TemporaryDirectory(prefix="stackjax-") as name:
        local = Path(name) / "set"
        manifest = prepare(dataclasses.replace(config, paths=(*config.inputs, str(local))))
        upload(local, output, last=MANIFEST)
    return manifest


def choose_split(text: str, validation_fraction: float) -> SplitName:
    """Returns a document's split, a pure function of the text."""
    digest = hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest()
    held_out = int.from_bytes(digest, "big") < validation_fraction * 2**64
    return "validation" if held_out else "train"


def write_part(config: PrepareConfig, digest: str, staging: str, part: Part) -> WrittenPart:
    """Tokenizes a part and writes the part's shards into the staging directory.

    Raises:
      UserError: A document is unreadable.
      OSError: The disk is full, or memory is too small.
    """
    tokenizer = _load_once(config.tokenizer, config.end_token, digest)
    stem, left_out = Path(staging) / f"part{part.index:05d}", Counter[str]()
    documents = _split_documents(config, part, left_out)
    try:
        shards = write_shards(documents, tokenizer, stem, left_out)
    except MemoryError as error:
        names = sorted({piece.source for piece in part.pieces})
        raise OSError(
            f"too little memory to read {names[0]!r} or one of {len(names) - 1} files after "
            f"it; try a smaller --num-processes, or cut large documents."
        ) from error
    return WrittenPart(shards=shards, left_out=left_out)


def _split_documents(
    config: PrepareConfig, part: Part, left_out: Counter[str]
) -> Iterator[tuple[SplitName, str]]:
    for piece in part.pieces:
        for text in read_documents(piece, config.text_field, config.null_texts):
            if text is None:
                left_out["rows whose text is null"] += 1
            elif piece.held_out is None:
                yield choose_split(text, config.validation_fraction), text
            else:
                yield "validation" if piece.held_out else "train", text


@functools.cache
def _load_once(name: str, end_token: str | None, digest: str) -> Tokenizer:
    """Returns a tokenizer; UserError if the file no longer matches `digest`."""
    tokenizer = read_tokenizer(name, end_token)
    if tokenizer.digest != digest:
        raise UserError(f"tokenizer {name!r} has changed while in use; start again.")
    return tokenizer


def _write_parts(
    config: PrepareConfig, digest: str, staging: Path, parts: list[Part]
) -> list[WrittenPart]:
    """Returns all written parts, in order."""
    num_processes = min(config.num_processes or os.cpu_count() or 1, len(parts))
    write = functools.partial(write_part, config, digest, str(staging))
    written = show_progress(parts, run_in_processes(write, parts, num_processes))
    found = dict(warn_if_disk_is_small(parts, staging, written))
    return [found[index] for index in range(len(parts))]


def _join_results(results: list[ShardsOfPart], staging: Path) -> dict[SplitName, Split]:
    """Renames all shards by split and order, and returns the splits."""
    splits: dict[SplitName, Split] = {}
    for name in SPLITS:
        found = [result[name] for result in results if name in result]
        shards = []
        for index, (shard, _) in enumerate(found):
            file = f"{name}-{index:05d}-of-{len(found):05d}.array_record"
            lengths = dataclasses.replace(shard.lengths, file=file + SUFFIX)
            renamed = dataclasses.replace(shard, file=file, lengths=lengths)
            for old, new in zip(shard.files, renamed.files, strict=True):
                (staging / old).rename(staging / new)
            shards.append(renamed)
        splits[name] = Split(
            tokens=sum(shard.tokens for shard in shards),
            documents=sum(documents for _, documents in found),
            shards=tuple(shards),
        )
    return splits


def _build_manifest(tokenizer: Tokenizer, splits: dict[SplitName, Split]) -> Manifest:
    if not splits["train"].tokens:
        raise UserError("the inputs have no text for the split 'train'; give more text.")
    return Manifest(
        tokenizer=tokenizer_info(tokenizer),
        dtype=token_dtype(tokenizer),
        splits=splits,
    )
