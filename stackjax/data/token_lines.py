"""Tokens as lines of text, with visible borders."""

import itertools
from collections.abc import Iterator, Sequence

from rich.cells import cell_len

BORDER = "│"
_COLORS = ("\x1b[30;48;5;153m", "\x1b[30;48;5;223m")
"""Black on blue and on orange, readable on light and on dark terminals."""
_PLAIN = "\x1b[0m"

Cell = tuple[str, str]
"""A printable character or escape, and its color."""


def visible(data: bytes) -> str:
    """Returns a token as a printable text.

    Control characters become escapes such as `\\n`, and bytes without the rest of their
    character become `<0xC3>`.

    >>> print(visible(b"a\\n\\xc3"))
    a\\n<0xC3>
    """
    return "".join(_characters(data))


def _characters(data: bytes) -> Iterator[str]:
    """Yields the printable form of each character, or of each byte without the others."""
    for character in data.decode(errors="surrogateescape"):
        if "\udc80" <= character <= "\udcff":
            yield f"<0x{ord(character) - 0xDC00:02X}>"
        elif character.isprintable() and character != "\\":
            yield character
        else:
            yield character.encode("unicode_escape").decode()


def token_lines(tokens: Sequence[bytes], width: int, *, is_colored: bool) -> list[str]:
    """Returns tokens as lines; escapes stay whole.

    Args:
      width: Terminal cells in a line, at least as many as an escape has.
      is_colored: Give tokens background colors in turn; else `BORDER` is between tokens.
    """
    cells: list[Cell] = []
    for index, token in enumerate(tokens):
        if index and not is_colored:
            cells.append((BORDER, ""))
        color = _COLORS[index % len(_COLORS)] if is_colored else ""
        cells += [(each, color) for each in _characters(token)]
    return ["".join(_painted(line)) for line in _fold(cells, width)]


def _fold(cells: Sequence[Cell], width: int) -> Iterator[list[Cell]]:
    """Yields the cells of each line."""
    line: list[Cell] = []
    used = 0
    for text, color in cells:
        size = cell_len(text)
        if line and used + size > width:
            yield line
            line, used = [], 0
        line.append((text, color))
        used += size
    if line:
        yield line


def _painted(line: Sequence[Cell]) -> Iterator[str]:
    for color, group in itertools.groupby(line, key=lambda cell: cell[1]):
        text = "".join(text for text, _ in group)
        yield f"{color}{text}{_PLAIN}" if color else text
