"""The notation of arXiv:2405.15319 for the source layers that a target is made of."""

import re

from stackjax.errors import UserError

_RUN = re.compile(r"(\d+)\.\.(\d+)")
_MAX_LAYERS = 10_000
_PART = re.compile(r"\(([^()*-]+)\)(?:\*(\d+))?|([^()*-]+)(?:\*(\d+))?")


def parse_pattern(pattern: str) -> tuple[int, ...]:
    """Returns the source layer of every target layer, counted from 0.

    Patterns count layers from 1. Parts are joined by `-`, and `*n` repeats a part:
    `12-345*7-6` is layer 1, layer 2, then 3 4 5 seven times, then layer 6. Where any of
    `,`, `..` and parentheses occurs, numbers may have several digits:
    `1,2-(3..10)*2-11` is 1, 2, then 3 to 10 twice, then 11.

    Raises:
      UserError: The pattern cannot be read, names layer 0, or makes more layers than 10000.

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
        times = int(group_times or plain_times or 1)
        if len(layers) + len(run) * times > _MAX_LAYERS:
            raise _too_many(pattern)
        layers += run * times
    if not layers:
        raise UserError(f"layer map {pattern!r} has no layers.")
    return tuple(layer - 1 for layer in layers)


def _parse_item(item: str, pattern: str) -> list[int]:
    item = item.strip()
    run = _RUN.fullmatch(item)
    first, last = run.groups() if run else (item, item)
    if not first.isdecimal():
        raise _unreadable(pattern, item)
    if int(last) - int(first) >= _MAX_LAYERS:
        raise _too_many(pattern)
    layers = list(range(int(first), int(last) + 1))
    if not layers or layers[0] < 1:
        raise UserError(
            f"layer map {pattern!r}: {item!r} names no layer; patterns count from 1 and "
            f"runs go upwards."
        )
    return layers


def _too_many(pattern: str) -> UserError:
    return UserError(f"layer map {pattern!r} has more layers than {_MAX_LAYERS}.")


def _unreadable(pattern: str, part: str) -> UserError:
    return UserError(
        f"layer map {pattern!r}: cannot read {part!r}; write parts joined by '-', as in "
        f"'12-345*7-6', or '1,2-(3..10)*2-11' for layers from 10 on."
    )
