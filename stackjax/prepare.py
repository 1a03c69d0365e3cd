"""Text to token shards: `python -m stackjax.prepare INPUT... OUTPUT --tokenizer bytes`.

The inputs are cut into parts, and each part becomes one shard of every split, so that
the bytes written depend on the inputs alone, never on the number of processes.
"""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Iterable, Iterator
from concurrent import futures
from pathlib import Path
from typing import Annotated, Any

import rich.progress
import tyro
from etils import epath

from stackjax.data import sources
from stackjax.data.documents import Piece, list_pieces, read_documents
from stackjax.data.shards import ShardsOfPart, token_dtype, write_shards
from stackjax.data.sources import Manifest, Split, SplitName
from stackjax.data.staging import refuse_existing, staging_directory, upload
from stackjax.data.tokenizer import Tokenizer
from stackjax.data.tokenizer_info import tokenizer_info, write_file
from stackjax.errors import UserError
from stackjax.interop.special_tokens import read_tokenizer
from stackjax.storage import check_bucket, is_remote

PART_BYTES = 2**24
MAX_PARTS = 256


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """Turns text into token shards for training."""

    paths: Annotated[
        tuple[str, ...],
        tyro.conf.Positional,
        tyro.conf.arg(name="paths", metavar="INPUT... OUTPUT"),
    ]
    """What to read, and last the directory to write. An input is a file or a glob (.jsonl,
    .jsonl.gz, .jsonl.zst, .parquet, or text, one document a file) or tfds:NAME."""
    tokenizer: str
    """`bytes`, a Hugging Face tokenizer.json, a SentencePiece .model, or a folder of
    transformers with one of them."""
    text_field: str = "text"
    """Field, column or feature that holds the text."""
    validation_fraction: float = 0.005
    """Fraction of the documents that are held out, chosen by a hash of their text, unless
    a TFDS dataset has a validation split of its own."""
    num_processes: int | None = None
    """Processes that share the work; by default one for each core."""
    end_token: str | None = None
    """Token that ends a document; by default the usual one that the tokenizer has."""

    @property
    def inputs(self) -> tuple[str, ...]:
        """What to read."""
        return self.paths[:-1]

    @property
    def output(self) -> str:
        """The directory to write."""
        return self.paths[-1]

    def __post_init__(self):
        if len(self.paths) < 2:
            raise UserError(
                f"the paths {self.paths} are too few; give at least one INPUT, and last "
                f"the OUTPUT."
            )
        if not 0 <= self.validation_fraction < 1:
            raise UserError(
                f"validation_fraction is {self.validation_fraction}; it must be at least "
                f"0 and less than 1."
            )
        if self.num_processes is not None and self.num_processes < 1:
            raise UserError(f"num_processes is {self.num_processes}; it must be at least 1.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """The pieces that one call of a worker turns into shards."""

    index: int
    """Place in the stream."""
    pieces: tuple[Piece, ...]
    """What is read, in order."""

    @property
    def num_bytes(self) -> int:
        """Size of what is read, about."""
        return sum(piece.num_bytes for piece in self.pieces)


def prepare(config: PrepareConfig) -> Manifest:
    """Writes the token shards of the inputs and returns their manifest.

    All is written beside OUTPUT and renamed at the end, so OUTPUT is complete or absent; or
    written into a temporary directory, where OUTPUT is in a bucket, and uploaded at the end.

    Raises:
      FileExistsError: OUTPUT exists already.
      UserError: An input or the tokenizer cannot be used.
      OSError: Reading or writing failed.
    """
    tokenizer = read_tokenizer(config.tokenizer, config.end_token)
    output = epath.Path(config.output)
    check_bucket(config.output)
    refuse_existing(output)
    if is_remote(output):
        return _prepare_and_upload(config, output)
    with staging_directory(output) as staging:
        scratch = staging / "scratch"
        parts = group_pieces(list(list_pieces(config.inputs, str(scratch))))
        running = _run_parts(config, tokenizer.digest, str(staging), parts)
        results = list(_show_progress(parts, running))
        shutil.rmtree(scratch, ignore_errors=True)
        manifest = _build_manifest(tokenizer, _join_results(results, staging))
        write_file(tokenizer, epath.Path(staging))
        sources.write_manifest(str(staging), manifest)
    return manifest


def _prepare_and_upload(config: PrepareConfig, output: epath.Path) -> Manifest:
    with tempfile.TemporaryDirectory(prefix="stackjax-") as name:
        local = Path(name) / "set"
        manifest = prepare(dataclasses.replace(config, paths=(*config.inputs, str(local))))
        upload(local, output, last=sources.MANIFEST)
    return manifest


def group_pieces(pieces: list[Piece]) -> list[Part]:
    """Returns the pieces in a few hundred parts of about equal size, in order."""
    size = max(PART_BYTES, sum(piece.num_bytes for piece in pieces) // MAX_PARTS)
    before = itertools.accumulate((p.num_bytes for p in pieces), initial=0)
    numbered = zip(before, pieces, strict=False)
    groups = itertools.groupby(numbered, key=lambda pair: pair[0] // size)
    return [
        Part(index=index, pieces=tuple(piece for _, piece in group))
        for index, (_, group) in enumerate(groups)
    ]


def choose_split(text: str, validation_fraction: float) -> SplitName:
    """Returns the split of a document: a function of its text alone."""
    digest = hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest()
    held_out = int.from_bytes(digest, "big") < validation_fraction * 2**64
    return "validation" if held_out else "train"


def write_part(config: PrepareConfig, digest: str, staging: str, part: Part) -> ShardsOfPart:
    """Tokenizes one part and writes its shards into the staging directory."""
    tokenizer = _load_once(config.tokenizer, config.end_token, digest)
    stem = Path(staging) / f"part{part.index:05d}"
    return write_shards(_split_documents(config, part), tokenizer, stem)


def _split_documents(config: PrepareConfig, part: Part) -> Iterator[tuple[SplitName, str]]:
    for piece in part.pieces:
        for text in read_documents(piece, config.text_field):
            if piece.held_out is None:
                yield choose_split(text, config.validation_fraction), text
            else:
                yield "validation" if piece.held_out else "train", text


@functools.cache
def _load_once(name: str, end_token: str | None, digest: str) -> Tokenizer:
    """Returns a tokenizer; `digest` tells apart files that change under one name."""
    tokenizer = read_tokenizer(name, end_token)
    if tokenizer.digest != digest:
        raise UserError(f"tokenizer {name!r} was changed while it was in use.")
    return tokenizer


def _run_parts(
    config: PrepareConfig, digest: str, staging: str, parts: list[Part]
) -> Iterator[ShardsOfPart]:
    """Yields the result of each part, in order, from one or more processes."""
    write = functools.partial(write_part, config, digest, staging)
    num_processes = min(config.num_processes or os.cpu_count() or 1, len(parts))
    if num_processes <= 1:
        yield from map(write, parts)
        return
    with _worker_pool(num_processes) as pool:
        try:
            yield from pool.map(write, parts)
        except futures.process.BrokenProcessPool as error:
            raise OSError(
                "a worker process was killed, perhaps for want of memory; "
                "try a smaller --num-processes."
            ) from error


@contextlib.contextmanager
def _worker_pool(num_processes: int) -> Iterator[futures.ProcessPoolExecutor]:
    """Yields processes that end at once when this one fails, or dies."""
    context = multiprocessing.get_context("spawn")
    reader, writer = context.Pipe(duplex=False)
    with (
        reader,
        futures.ProcessPoolExecutor(
            num_processes, context, initializer=_exit_with, initargs=(reader,)
        ) as pool,
        writer,
    ):
        yield pool


def _exit_with(parent: Any) -> None:
    """Ends this worker as soon as the other end of its connection is closed."""

    def watch() -> None:
        with contextlib.suppress(EOFError, OSError):
            parent.recv()
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # The parent tells us to end.
    threading.Thread(target=watch, daemon=True).start()


def _show_progress(
    parts: list[Part], results: Iterable[ShardsOfPart]
) -> Iterator[ShardsOfPart]:
    """Yields the results while a terminal shows a bar, and a log a few lines."""
    total = sum(part.num_bytes for part in parts)
    done = told = 0
    columns = (
        *rich.progress.Progress.get_default_columns(),
        rich.progress.DownloadColumn(),
    )
    with rich.progress.Progress(*columns, disable=not sys.stdout.isatty()) as bar:
        task = bar.add_task("preparing", total=total)
        for part, result in zip(parts, results, strict=True):
            yield result
            done += part.num_bytes
            bar.update(task, completed=done)
            percent = 100 * done // max(total, 1)
            if bar.disable and percent >= told + 10:
                told = percent
                print(f"prepared {percent} % of {total / 1e6:.1f} MB", flush=True)


def _join_results(results: list[ShardsOfPart], staging: Path) -> dict[SplitName, Split]:
    """Renames the shards of all parts to their place in the stream of each split."""
    splits: dict[SplitName, Split] = {}
    for name in sources.SPLITS:
        found = [result[name] for result in results if name in result]
        shards = []
        for index, (shard, _) in enumerate(found):
            file = f"{name}-{index:05d}-of-{len(found):05d}.array_record"
            (staging / shard.file).rename(staging / file)
            shards.append(dataclasses.replace(shard, file=file))
        splits[name] = Split(
            tokens=sum(shard.tokens for shard in shards),
            documents=sum(documents for _, documents in found),
            shards=tuple(shards),
        )
    return splits


def _build_manifest(tokenizer: Tokenizer, splits: dict[SplitName, Split]) -> Manifest:
    if not splits["train"].tokens:
        raise UserError("the inputs have no text for the split 'train'.")
    return Manifest(
        tokenizer=tokenizer_info(tokenizer),
        dtype=token_dtype(tokenizer),
        splits=splits,
    )


def main() -> None:
    """Runs the command; a mistake of the user ends it with one line and status 2."""
    try:
        config = tyro.cli(PrepareConfig, prog="python -m stackjax.prepare")
        manifest = prepare(config)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("error: interrupted; nothing was written.", file=sys.stderr)
        sys.exit(130)
    for name, split in manifest.splits.items():
        print(f"{name}: {split.tokens} tokens in {split.documents} documents")


if __name__ == "__main__":
    main()
