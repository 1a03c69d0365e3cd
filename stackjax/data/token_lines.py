"""Tokens as lines of text, with visible borders."""

import itertools
from collections.abc import Iterator, Sequence

from rich.cells import cell_len

BORDER = "│"
_COLORS = ("\x1b[30;48;5;153m", "\x1b[30;48;5;223m")
"""Black on blue and on orange, readable on light and on dark terminals."""
_PLAIN = "\x1b[0m"


def visible(data: bytes) -> str:
    """Returns a token as a printable text.

    Control characters become escapes such as `\\n`, and bytes without the rest of their
    character become `<0xC3>`.

    >>> print(visible(b"a\\n\\xc3"))
    a\\n<0xC3>
    """
    return "".join(map(_visible, data.decode(errors="surrogateescape")))


def _visible(character: str) -> str:
    if "\udc80" <= character <= "\udcff":
        return f"<0x{ord(character) - 0xDC00:02X}>"
    if character.isprintable() and character != "\\":
        return character
    return character.encode("unicode_escape").decode()


def token_lines(tokens: Sequence[bytes], width: int, *, is_colored: bool) -> list[str]:
    """Returns tokens as lines.

    Args:
      width: Terminal cells in a line.
      is_colored: Give tokens background colors in turn; else `BORDER` is between tokens.
    """
    if not is_colored:
        text = BORDER.join(map(visible, tokens))
        return ["".join(c for c, _ in line) for line in _fold([(c, "") for c in text], width)]
    colors = itertools.cycle(_COLORS)
    cells = [
        (c, color) for token, color in zip(tokens, colors, strict=False) for c in visible(token)
    ]
    return ["".join(_painted(line)) for line in _fold(cells, width)]


def _fold(cells: Sequence[tuple[str, str]], width: int) -> Iterator[list[tuple[str, str]]]:
    """Yields characters and their colors by line."""
    line: list[tuple[str, str]] = []
    used = 0
    for character, color in cells:
        size = cell_len(character)
        if line and used + size > width:
            yield line
            line, used = [], 0
        line.append((character, color))
        used += size
    if line:
        yield line


def _painted(line: Sequence[tuple[str, str]]) -> Iterator[str]:
    for color, group in itertools.groupby(line, key=lambda cell: cell[1]):
        yield color + "".join(c for c, _ in group) + _PLAIN
