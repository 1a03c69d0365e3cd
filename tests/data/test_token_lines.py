"""Tokens as lines: the characters, their borders and the width."""

import re

import hypothesis
import hypothesis.strategies as st
import pytest
from rich.cells import cell_len

from stackjax.data.token_lines import BORDER, token_lines, visible

SHOWN = [
    (b"a b", "a b"),
    (b"a\n\t\r\0", r"a\n\t\r\x00"),
    (b"\x1b[31m", r"\x1b[31m"),
    (b"back\\n", r"back\\n"),
    ("\u202e\u2028\x9b\u00a0".encode(), r"\u202e\u2028\x9b\xa0"),
    ("déjà 日本 🙂".encode(), "déjà 日本 🙂"),
    (b"\xc3", "<0xC3>"),
    (b" \xe6\x97", " <0xE6><0x97>"),
    (b"\xa9\n\xff", r"<0xA9>\n<0xFF>"),
    (b"", ""),
]
COLOR = re.compile("\x1b\\[[0-9;]*m")
TOKENS = st.lists(st.binary(max_size=12) | st.text(max_size=6).map(str.encode), max_size=30)


@pytest.mark.parametrize(("data", "text"), SHOWN)
def test_token_is_printable(data, text):
    assert visible(data) == text
    assert text.isprintable()


@hypothesis.given(tokens=TOKENS, width=st.integers(10, 40))
def test_lines_have_all_tokens_with_borders_and_fit(tokens, width):
    lines = token_lines(tokens, width, is_colored=False)
    assert "".join(lines) == BORDER.join(map(visible, tokens))
    assert all(cell_len(line) <= width for line in lines)


def test_escapes_stay_whole():
    lines = token_lines([b"abcdefgh\n", b"\xc3", b"i"], 10, is_colored=False)
    assert lines == ["abcdefgh\\n", "│<0xC3>│i"]


@hypothesis.given(tokens=TOKENS, width=st.integers(10, 40))
def test_neighbors_have_different_colors(tokens, width):
    lines = token_lines(tokens, width, is_colored=True)
    plain = [COLOR.sub("", line) for line in lines]
    assert "".join(plain) == "".join(map(visible, tokens))
    assert all(cell_len(line) <= width for line in plain)
    assert all(line.startswith("\x1b[") and line.endswith("\x1b[0m") for line in lines)
    colors, color = [], ""
    for part in re.split("(\x1b\\[[0-9;]*m)", "".join(lines)):
        color = part if COLOR.fullmatch(part) else color
        colors += [] if COLOR.fullmatch(part) else [color] * len(part)
    expected = [i % 2 for i, token in enumerate(tokens) for _ in visible(token)]
    assert len(set(zip(colors, expected, strict=True))) == len(set(expected))
