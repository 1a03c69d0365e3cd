"""Conversion of text to token shards.

The inputs are split into parts, and each part becomes a shard per split. The shards depend
only on the inputs, not on `num_processes`. Finished parts stay in a staging directory, where
the same command goes on after a kill.
"""

import dataclasses
import functools
import hashlib
import itertools
import os
import shutil
import stat
import tempfile
from collections import Counter
from pathlib import Path
from typing import Literal

from etils import epath

from stackjax.data.config import PrepareConfig
from stackjax.data.documents import list_pieces, reading_of
from stackjax.data.join_parts import join_parts, undo_join
from stackjax.data.manifest import MANIFEST, Manifest, write_manifest
from stackjax.data.overlap import check_same_kind, overlap
from stackjax.data.part_record import finished_parts
from stackjax.data.parts import (
    Part,
    group_pieces,
    show_progress,
    tell_listing,
    warn_if_disk_is_small,
)
from stackjax.data.piece import TOKEN_FORMATS
from stackjax.data.preparation import PARTS, SCRATCH, TARGET, claim, identify
from stackjax.data.shards import token_dtype
from stackjax.data.text_field import Reading
from stackjax.data.write_part import write_part
from stackjax.files.staging import resumable_directory, upload
from stackjax.files.storage import check_bucket, is_remote
from stackjax.runtime.errors import UserError
from stackjax.runtime.worker_pool import run_in_processes
from stackjax.tokenizer.special_tokens import read_tokenizer
from stackjax.tokenizer.tokenizer import Tokenizer
from stackjax.tokenizer.tokenizer_info import tokenizer_info, write_file


def prepare(config: PrepareConfig) -> Manifest:
    """Writes the inputs as token shards and returns the manifest.

    A staging directory becomes OUTPUT at the end, so OUTPUT is complete or absent. For a
    bucket, the staging directory is below TMPDIR and is uploaded at the end.

    Raises:
      FileExistsError: OUTPUT exists already.
      UserError: An input or the tokenizer is invalid.
      OSError: Reading or writing failed.
    """
    tokenizer = read_tokenizer(config.tokenizer, config.end_token)
    check_bucket(config.output)
    output = epath.Path(config.output)
    _check_not_a_file(config.output)
    reading = reading_of(config, tokenizer)
    staging = _staging_of(output)
    with resumable_directory(staging, output, f"{PARTS}/*.json"):
        parts, unread = _list_parts(config, reading, staging / SCRATCH)
        hashed = _content_of(parts)
        for other in config.compare_with:
            check_same_kind(config.output, tokenizer.digest, hashed, other)
        claim(staging, identify(config, tokenizer, parts))
        undo_join(staging / PARTS, staging / TARGET, len(parts))
        finished = finished_parts(staging / PARTS, len(parts), reading)
        _write_parts(config, tokenizer.digest, staging, parts, set(finished))
        manifest = _join(tokenizer, staging, len(parts))
        manifest = dataclasses.replace(
            manifest,
            validation_fraction=config.validation_fraction,
            hashed=hashed,
            left_out={**manifest.left_out, **unread},
        )
        write_manifest(str(staging / TARGET), manifest)
        _print_counts(config, manifest, str(staging / TARGET))
        if is_remote(output):
            upload(staging / TARGET, output, last=MANIFEST)
        else:
            (staging / TARGET).rename(output)
    return manifest


def _check_not_a_file(output: str) -> None:
    if not is_remote(output) and Path(output).is_file():
        raise UserError(
            f"the last path, {output!r}, is the OUTPUT, but a file with this name exists "
            f"already; name a new directory last."
        )


def _staging_of(output: epath.Path) -> Path:
    """Returns the staging directory of an output, always the same."""
    if not is_remote(output):
        return Path(output.parent / f".{output.name}.unfinished")
    name = hashlib.sha256(os.fspath(output).encode()).hexdigest()[:16]
    staging = Path(tempfile.gettempdir()) / f"stackjax-{os.getuid()}-{name}"
    staging.mkdir(mode=0o700, exist_ok=True)
    found = staging.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise UserError(f"{staging} is not a directory of this user; set another TMPDIR.")
    return staging


def _list_parts(
    config: PrepareConfig, reading: Reading, scratch: Path
) -> tuple[list[Part], Counter[str]]:
    """Returns all parts, and the number of unread files by reason."""
    shutil.rmtree(scratch, ignore_errors=True)
    unread = Counter[str]()
    pieces = list_pieces(config.inputs, str(scratch), reading, unread)
    return group_pieces(list(tell_listing(pieces))), unread


def _content_of(parts: list[Part]) -> Literal["text", "tokens"]:
    """Returns what the documents are; UserError for texts and tokens together."""
    first: dict[bool, str] = {}
    for piece in itertools.chain.from_iterable(part.pieces for part in parts):
        first.setdefault(piece.format in TOKEN_FORMATS, piece.source)
    if len(first) == 2:
        raise UserError(
            f"{first[False]!r} has text and {first[True]!r} has tokens; prepare a data set of "
            f"each, so that equal documents can be counted."
        )
    return "tokens" if True in first else "text"


def _write_parts(
    config: PrepareConfig, digest: str, staging: Path, parts: list[Part], finished: set[int]
) -> None:
    """Writes all parts that are not finished."""
    if finished:
        print(f"going on: {len(finished)} of {len(parts)} parts are finished", flush=True)
    for path in (staging / PARTS).glob("part*-*"):
        path.unlink()  # Of a killed worker.
    missing = [part for part in parts if part.index not in finished]
    num_processes = min(config.num_processes or os.cpu_count() or 1, len(missing))
    write = functools.partial(write_part, config, digest, staging / PARTS)
    written = show_progress(missing, run_in_processes(write, missing, num_processes))
    for _ in warn_if_disk_is_small(missing, staging, written):
        pass


def _join(tokenizer: Tokenizer, staging: Path, num_parts: int) -> Manifest:
    """Writes the data set without a manifest into the staging directory."""
    target = staging / TARGET
    info, dtype = tokenizer_info(tokenizer), token_dtype(tokenizer)
    manifest = join_parts(staging / PARTS, target, num_parts, info, dtype)
    write_file(tokenizer, epath.Path(target))
    return manifest


def _print_counts(config: PrepareConfig, manifest: Manifest, path: str) -> None:
    for reason, count in manifest.left_out.items():
        print(f"left out: {count} ({reason})")
    for other in config.compare_with:
        shared = overlap(path, other)
        print(
            f"shared with {other}: {shared.train} documents in both training splits; "
            f"{shared.validation_in_train} validation documents are in its training split; "
            f"{shared.train_in_validation} training documents are in its validation split"
        )
