"""Documents from tar archives in the layout of WebDataset.

Members with the same name up to the first dot are a sample, such as `0001.txt` and `0001.json`.
A sample's text is the `.txt` member, else the text field of the `.json` member.
"""

import itertools
import tarfile
from collections.abc import Iterator
from typing import Any, BinaryIO

from stackjax.data.compression import DAMAGED, opened
from stackjax.data.formats import is_compressed
from stackjax.data.json_lines import text_of_json
from stackjax.data.piece import Piece
from stackjax.data.plain_text import decode_text
from stackjax.data.text_field import BadRow, LeftOut, Reading, leave_out

BLOCK_BYTES = 2**20


def read_tar(piece: Piece, reading: Reading) -> Iterator[str | LeftOut]:
    """Yields the text of each sample."""
    try:
        with opened(piece.source, is_compressed(piece.source)) as file:
            yield from _read_samples(file, piece.source, reading)
            # The checksum of a compressed file is at its end.
            while file.read(BLOCK_BYTES):
                pass
    except tarfile.TarError as error:
        damage = BadRow(f"the archive is damaged or truncated: {error}", DAMAGED)
        yield leave_out(damage, reading, lambda: f"{piece.source!r}")
    except BadRow as error:
        yield leave_out(error, reading, lambda: f"{piece.source!r}")


def _read_samples(file: BinaryIO, source: str, reading: Reading) -> Iterator[str | LeftOut]:
    with tarfile.open(fileobj=file, mode="r|") as archive:
        members = ((member, archive.extractfile(member)) for member in archive)
        texts = (
            (member.name, data.read() if _suffix(member.name) in ("txt", "json") else b"")
            for member, data in members
            if data is not None
        )
        for key, group in itertools.groupby(texts, key=lambda pair: _key(pair[0])):
            fields = {_suffix(name): data for name, data in group}
            place = f"{source!r}, sample {key!r}"
            try:
                yield _text_of(fields, reading.text_field)
            except BadRow as error:
                yield leave_out(error, reading, lambda place=place: place)
        stream: Any = archive.fileobj
        if stream.tell() == archive.offset:  # Else the last block read is the end.
            raise tarfile.ReadError("it ends without an end block")


def _text_of(fields: dict[str, bytes], text_field: str) -> str:
    if "txt" in fields:
        return decode_text(fields["txt"])
    if "json" in fields:
        return text_of_json(fields["json"], text_field)
    found = ", ".join(fields)
    raise BadRow(f"no .txt and no .json, only {found:.300}", "no text field")


def _key(name: str) -> str:
    directory, slash, file = name.rpartition("/")
    return directory + slash + file.partition(".")[0]


def _suffix(name: str) -> str:
    return name.rpartition("/")[2].partition(".")[2].lower()
