"""Token streams: `.bin` files of nanoGPT, llm.c and modded-nanogpt.

nanoGPT writes uint16 tokens without a header. The other two write a header of 256 int32: a
magic number, a version and the number of tokens. Documents are the runs between end tokens.
"""

import dataclasses
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np

from stackjax.data.piece import Piece, cut
from stackjax.data.token_documents import TokenRules, check_vocabulary, without_begin
from stackjax.files.input_file import open_input, stamp_of
from stackjax.runtime.errors import UserError

HEADER_BYTES = 1024
BLOCK_TOKENS = 2**20
FIRST_TOKENS = 2**22
"""The tokens that must have an end token among them."""
_HEADERS = {(20240520, 1): "<u2", (20240801, 7): "<u4"}
"""From magic number and version to dtype."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """Position and dtype of the tokens in a file."""

    offset: int
    dtype: np.dtype
    count: int


def list_token_stream(path: str, size: int, rules: TokenRules) -> Iterator[Piece]:
    """Yields the pieces of a file.

    Raises:
      UserError: The file is truncated, or is of another tokenizer.
    """
    with open_input(path) as file:
        layout = _read_layout(file, path, size, rules)
        first = _read(file, layout, 0, min(layout.count, FIRST_TOKENS))
    check_vocabulary(first, rules, path)
    if not (first == rules.end_id).any():
        raise UserError(
            f"{path!r} has no end token {rules.end_id} among its first {len(first)} tokens, so "
            f"its documents cannot be told apart; name the token between them with --end-token."
        )
    item = layout.dtype.itemsize
    for start, stop in cut(layout.count, layout.count * item):
        num_bytes = (stop - start) * item
        yield Piece(
            format="token_stream", source=path, start=start, stop=stop, num_bytes=num_bytes
        )


def read_token_stream(piece: Piece, rules: TokenRules) -> Iterator[np.ndarray]:
    """Yields the documents with a first token in a piece, [T]."""
    size, *_ = stamp_of(piece.source)
    with open_input(piece.source) as file:
        layout = _read_layout(file, piece.source, size, rules)
        for run in _runs(file, layout, piece, rules.end_id):
            check_vocabulary(run, rules, piece.source)
            yield without_begin(run, rules)


def _runs(file: BinaryIO, layout: Layout, piece: Piece, end_id: int) -> Iterator[np.ndarray]:
    """Yields the nonempty runs between end tokens that begin in a piece."""
    # Except for the first, a run begins after an end token.
    position = max(piece.start - 1, 0)
    is_inside, begun = piece.start == 0, []
    while position < layout.count:
        block = _read(file, layout, position, min(BLOCK_TOKENS, layout.count - position))
        previous = 0
        for end in np.flatnonzero(block == end_id).tolist():
            run = np.concatenate([*begun, block[previous:end]])
            if is_inside and len(run):
                yield run
            is_inside, begun, previous = True, [], end + 1
            if position + previous >= piece.stop:
                return
        if is_inside:
            begun.append(block[previous:])
        position += len(block)
    if is_inside and sum(map(len, begun)):
        yield np.concatenate(begun)


def _read(file: BinaryIO, layout: Layout, start: int, count: int) -> np.ndarray:
    file.seek(layout.offset + start * layout.dtype.itemsize)
    data = file.read(count * layout.dtype.itemsize)
    return np.frombuffer(data, layout.dtype)


def _read_layout(file: BinaryIO, path: str, size: int, rules: TokenRules) -> Layout:
    header = np.frombuffer(file.read(HEADER_BYTES)[:12].ljust(12, b"\0"), "<i4").tolist()
    if name := _HEADERS.get((header[0], header[1])):
        dtype = np.dtype(name)
        if size != HEADER_BYTES + header[2] * dtype.itemsize:
            raise UserError(
                f"{path!r} is damaged: it has {size} bytes, but its header announces "
                f"{header[2]} tokens; copy it again."
            )
        return Layout(HEADER_BYTES, dtype, header[2])
    dtype = np.dtype("<u2")
    if size % dtype.itemsize or not size:
        raise UserError(f"{path!r} is damaged: {size} bytes are no uint16 tokens.")
    if rules.vocab_size > 2**16:
        raise UserError(
            f"{path!r} has no header, so its tokens are read as uint16, but the vocabulary of "
            f"the tokenizer has {rules.vocab_size} tokens; name with --tokenizer the one that "
            f"made it."
        )
    return Layout(0, dtype, size // dtype.itemsize)
