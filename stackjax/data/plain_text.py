"""Documents from plain text: one per file."""

from stackjax.data.piece import Piece
from stackjax.data.text_field import BadRow, LeftOut, Reading, leave_out
from stackjax.files.input_file import open_input

_CONVERT = "convert it with iconv if it is text in another encoding, or leave it out"


def read_text(piece: Piece, reading: Reading) -> str | LeftOut:
    """Returns the text in a file."""
    with open_input(piece.source) as file:
        data = file.read()
    try:
        return decode_text(data)
    except BadRow as error:
        return leave_out(error, reading, lambda: f"{piece.source!r}")


def decode_text(data: bytes) -> str:
    """Returns the text in UTF-8 data, without a byte order mark.

    Raises:
      BadRow: The data is not UTF-8, or has NUL bytes.
    """
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadRow(f"this is not UTF-8 text: {error}; {_CONVERT}.", "not UTF-8") from error
    if "\0" in text:
        message = f"this is not text: byte {data.index(bytes(1))} is NUL; {_CONVERT}."
        raise BadRow(message, "not text")
    return text
