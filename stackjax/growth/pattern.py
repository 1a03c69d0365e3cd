"""Layer patterns in the notation of arXiv:2405.15319."""

import re

from stackjax.model.config import MAX_LAYERS
from stackjax.runtime.errors import UserError
from stackjax.runtime.ranges import show

_RUN = re.compile(r"(\d+)\.\.(\d+)")
_PART = re.compile(r"\(([^()*-]+)\)(?:\*(\d+))?|([^()*-]+)(?:\*(\d+))?")


def parse_pattern(pattern: str) -> tuple[int, ...]:
    """Returns the source layer, counted from 0, for each target layer.

    Patterns count layers from 1. Parts are joined by `-`, and `*n` repeats a part:
    `12-345*7-6` is layer 1, layer 2, then 3 4 5 seven times, then layer 6. In a pattern with
    `,`, `..` or parentheses, numbers may have several digits: `1,2-(3..10)*2-11` is 1, 2, then
    3 to 10 twice, then 11.

    Raises:
      UserError: The pattern cannot be parsed, names layer 0, or has more than 10000 layers.

    >>> parse_pattern("1-23*2-4")
    (0, 1, 2, 1, 2, 3)
    """
    numbered = any(mark in pattern for mark in (",", "..", "("))
    layers: list[int] = []
    for part in pattern.split("-"):
        match = _PART.fullmatch(part.strip())
        if match is None:
            raise _unreadable(pattern, part)
        group, group_times, plain, plain_times = match.groups()
        names = group or plain
        items = names.split(",") if numbered else list(names)
        run = [layer for item in items for layer in _parse_item(item, pattern)]
        times = _number(group_times or plain_times or "1")
        if len(layers) + len(run) * times > MAX_LAYERS:
            raise _too_many(pattern)
        layers += run * times
    if not layers:
        raise UserError(f"layer map {show(pattern)} has no layers.")
    return tuple(layer - 1 for layer in layers)


def _parse_item(item: str, pattern: str) -> list[int]:
    item = item.strip()
    run = _RUN.fullmatch(item)
    first, last = run.groups() if run else (item, item)
    if not first.isdecimal():
        raise _unreadable(pattern, item)
    start, end = _number(first), _number(last)
    if end - start >= MAX_LAYERS:
        raise _too_many(pattern)
    layers = list(range(start, end + 1))
    if not layers or layers[0] < 1:
        raise UserError(
            f"layer map {show(pattern)}: {show(item)} names no layer; patterns count from 1 "
            f"and runs go upwards."
        )
    return layers


def _number(digits: str) -> int:
    """Returns a number from at most 9 digits; 9 digits already exceed the layer limit."""
    return int(digits.lstrip("0")[:9] or "0")


def _too_many(pattern: str) -> UserError:
    return UserError(f"layer map {show(pattern)} has more layers than {MAX_LAYERS}.")


def _unreadable(pattern: str, part: str) -> UserError:
    return UserError(
        f"layer map {show(pattern)}: cannot read {show(part)}; write parts joined by '-', as "
        f"in '12-345*7-6', or '1,2-(3..10)*2-11' for layers from 10 on."
    )
