"""Documents from the inputs to `prepare`, split into pieces for worker processes."""

import dataclasses
import functools
import itertools
import os
import stat
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent import futures

import numpy as np

from stackjax.data.config import PrepareConfig
from stackjax.data.formats import format_of, is_compressed
from stackjax.data.input_files import InputFile, find_files
from stackjax.data.json_lines import check_first_line, read_json_lines
from stackjax.data.megatron import index_of, list_megatron, read_megatron
from stackjax.data.parquet import list_parquet, read_parquet
from stackjax.data.piece import Piece, cut
from stackjax.data.plain_text import read_text
from stackjax.data.tar import read_tar
from stackjax.data.text_field import LeftOut, Reading
from stackjax.data.tfds_examples import list_tfds, read_tfds
from stackjax.data.token_documents import TokenRules
from stackjax.data.token_stream import list_token_stream, read_token_stream
from stackjax.files.input_file import is_there, stamp_of
from stackjax.files.storage import is_remote
from stackjax.runtime.errors import UserError
from stackjax.tokenizer.tokenizer import Tokenizer

FILES_AT_A_TIME = 16
FILES_IN_A_BATCH = 1024


def reading_of(config: PrepareConfig, tokenizer: Tokenizer) -> Reading:
    """Returns how the documents of a preparation are read."""
    return Reading(
        text_field=config.text_field,
        on_missing=config.on_missing,
        on_invalid=config.on_invalid,
        tokens=TokenRules(
            vocab_size=tokenizer.vocab_size,
            begin_ids=tokenizer.begin_ids,
            end_id=tokenizer.end_id,
        ),
    )


def list_pieces(
    inputs: tuple[str, ...], scratch: str, reading: Reading, left_out: Counter[str]
) -> Iterator[Piece]:
    """Yields the pieces of all inputs, in an order that depends only on the inputs.

    Checks the schema of every Parquet file and the first line of every JSON file.

    Args:
      scratch: Directory for the built-in corpus.
      left_out: Counts the files of test splits.

    Raises:
      UserError: An input is unreadable or given twice; the message names the file.
    """
    first: dict[str, str] = {}
    for name in inputs:
        if name.startswith("tfds:"):
            _check_named_once(name, [name], first)
            for piece in list_tfds(name.removeprefix("tfds:"), scratch, reading):
                yield dataclasses.replace(piece, input=name)
            continue
        files = find_files(name, left_out)
        _check_named_once(name, [file.path for file in files], first)
        # Network disks have a high latency, but serve many requests at the same time.
        with futures.ThreadPoolExecutor(FILES_AT_A_TIME) as pool:
            for batch in _batches(files):
                for pieces in pool.map(functools.partial(_list_file, reading), batch):
                    yield from (dataclasses.replace(piece, input=name) for piece in pieces)


def read_documents(piece: Piece, reading: Reading) -> Iterator[str | np.ndarray | LeftOut]:
    """Yields the documents in a piece, texts or tokens [T], and the skipped rows.

    Raises:
      UserError: A document is refused; the message names file and row.
    """
    _check_unchanged(piece)
    match piece.format:
        case "text":
            yield read_text(piece, reading)
        case "jsonl" | "compressed_jsonl":
            yield from read_json_lines(piece, reading)
        case "parquet":
            yield from read_parquet(piece, reading)
        case "tar":
            yield from read_tar(piece, reading)
        case "token_stream":
            yield from read_token_stream(piece, _rules(reading, piece.source))
        case "megatron":
            yield from read_megatron(piece, _rules(reading, piece.source))
        case "tfds":
            yield from read_tfds(piece, reading)
    _check_unchanged(piece)


def _batches(files: Iterable[InputFile]) -> Iterator[list[InputFile]]:
    # All at once, 200,000 files would be as many calls in memory.
    remaining = iter(files)
    while batch := list(itertools.islice(remaining, FILES_IN_A_BATCH)):
        yield batch


def _check_named_once(name: str, paths: list[str], first: dict[str, str]) -> None:
    """Raises UserError if a path also belongs to an earlier input.

    Args:
      first: From path to input, for all earlier inputs; this function adds `paths`.
    """
    for path in paths:
        place = path if is_remote(path) else os.path.abspath(path)
        if place in first:
            raise UserError(
                f"input {name!r} names {path!r}, which input {first[place]!r} names too; it "
                f"would be read twice, so leave one of them out."
            )
        first[place] = name


def _list_file(reading: Reading, file: InputFile) -> list[Piece]:
    """Returns the pieces in a file, after all quick checks."""
    path = file.path
    if not is_remote(path) and not stat.S_ISREG(os.stat(path).st_mode):
        raise UserError(f"input {path!r} is a device, pipe or socket; name a regular file.")
    stamp = _stamps(path)
    return [
        dataclasses.replace(piece, stamp=stamp, held_out=file.held_out)
        for piece in _cut_file(path, stamp, reading)
    ]


def _cut_file(path: str, stamp: tuple[int, ...], reading: Reading) -> Iterator[Piece]:
    size = stamp[0]
    match format_of(path):
        case "text":
            yield Piece(format="text", source=path, num_bytes=size)
        case "JSON lines" if is_compressed(path):
            check_first_line(path, reading)
            yield Piece(format="compressed_jsonl", source=path, num_bytes=size)
        case "JSON lines":
            check_first_line(path, reading)
            for start, stop in cut(size, size):
                yield Piece(
                    format="jsonl", source=path, start=start, stop=stop, num_bytes=stop - start
                )
        case "Parquet":
            yield from list_parquet(path, size, reading)
        case "tar":
            yield Piece(format="tar", source=path, num_bytes=size)
        case "tokens" if len(stamp) > 2:
            yield from list_megatron(path, size, stamp[2], _rules(reading, path))
        case "tokens":
            yield from list_token_stream(path, size, _rules(reading, path))


def _stamps(path: str) -> tuple[int, ...]:
    """Returns the stamp of a file, and of the index beside it."""
    if not path.lower().endswith((".bin", ".idx")):
        return stamp_of(path)
    index = index_of(path)
    if path.lower().endswith(".idx"):
        raise UserError(f"input {path!r} is an index; name the .bin beside it.")
    return stamp_of(path) + (stamp_of(index) if is_there(index) else ())


def _check_unchanged(piece: Piece) -> None:
    if piece.stamp is not None and _stamps(piece.source) != piece.stamp:
        raise UserError(f"{piece.source!r} has changed while being read; start again.")


def _rules(reading: Reading, path: str) -> TokenRules:
    if reading.tokens is None:
        raise UserError(f"{path!r} has tokens; a tokenizer is trained on text.")
    return reading.tokens
