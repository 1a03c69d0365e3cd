"""The textual form of growths: `stack(4)`, `width_split(embed=2, mlp=3/2)+noise(0.2)`."""

import dataclasses
import math
import re
import types
import typing
from collections.abc import Callable
from fractions import Fraction
from typing import Any, Literal

from stackjax.growth.base import Growth
from stackjax.growth.composition import MAX_LINKS, chain
from stackjax.growth.depth import DepthUpscale, InsertBlock, Interleave, LayerMap, Stack
from stackjax.growth.learned import Learn
from stackjax.growth.masked import DepthRandom, WidthRandom
from stackjax.growth.noise import Noise
from stackjax.growth.width import WidthSplit
from stackjax.growth.zero import DepthZero, WidthZero
from stackjax.runtime.errors import UserError
from stackjax.runtime.ranges import show

OPERATORS: dict[str, type[Growth]] = {
    "stack": Stack,
    "interleave": Interleave,
    "layer_map": LayerMap,
    "depth_upscale": DepthUpscale,
    "insert_block": InsertBlock,
    "depth_zero": DepthZero,
    "depth_random": DepthRandom,
    "width_split": WidthSplit,
    "width_zero": WidthZero,
    "width_random": WidthRandom,
    "learn": Learn,
    "noise": Noise,
}
"""Every growth operator by its name in text."""

_OPERATOR = re.compile(r"\s*(\w+)\s*\((.*)\)\s*", re.DOTALL)
# No exponents, which could make numbers of any length.
_RATIO = re.compile(r"[\d.]+(/\d+)?")


def parse_growth(text: str) -> Growth:
    """Returns the growth that a text describes: `parse_growth(str(growth)) == growth`.

    Operators are joined by `+`, from first to last.

    Raises:
      UserError: The text cannot be read, or describes no growth that there can be.

    >>> parse_growth("stack(2)+noise(0.2)")
    Chain(growths=(Stack(factor=2), Noise(alpha=0.2)))
    """
    parts, text = _split(text, "+"), show(text)
    if len(parts) > MAX_LINKS:
        raise UserError(
            f"growth {text} has {len(parts)} operators; {MAX_LINKS} may follow each other."
        )
    return chain(*(_parse_operator(part, text) for part in parts))


def replace_field(growth: Growth, field: str, text: str) -> Growth:
    """Returns a growth with one field as a text says; UserError if it has no such field."""
    name = next((name for name, kind in OPERATORS.items() if type(growth) is kind), None)
    if name is None:
        raise UserError(f"{growth} has no fields of its own; write the whole growth.")
    return dataclasses.replace(growth, **{field: _parse_value(name, field, text)})


def _parse_operator(part: str, text: str) -> Growth:
    match = _OPERATOR.fullmatch(part)
    if match is None:
        raise UserError(
            f"growth {text}: cannot read {show(part)}; write operators with their fields, "
            f"joined by '+', as in 'width_split(embed=2, mlp=2, heads=2)+stack(2)'."
        )
    name, inside = match.groups()
    if name not in OPERATORS:
        raise UserError(
            f"growth {text}: there is no operator {show(name)}; there are {_list(OPERATORS)}."
        )
    kind = OPERATORS[name]
    names = [field.name for field in dataclasses.fields(kind)]
    # The map of layers has commas of its own.
    items = [inside] if kind is LayerMap else _split(inside, ",")
    values: dict[str, Any] = {}
    for place, item in enumerate(items if inside.strip() else []):
        key, equals, value = item.partition("=")
        if not equals:
            if place >= len(names):
                raise UserError(f"growth {text}: {name} takes {_list(names)}, no more.")
            key, value = names[place], item
        key = key.strip()
        if key in values:
            raise UserError(f"growth {text}: {name} is given {show(key)} twice.")
        values[key] = _parse_value(name, key, value.strip())
    missing = [
        field.name
        for field in dataclasses.fields(kind)
        if field.default is dataclasses.MISSING and field.name not in values
    ]
    if missing:
        raise UserError(f"growth {text}: {name} needs {_list(missing)}.")
    return kind(**values)


def _parse_value(name: str, field: str, text: str) -> Any:
    hints = typing.get_type_hints(OPERATORS[name])
    if field not in hints:
        raise UserError(f"{name} has no field {field!r}; it has {_list(hints)}.")
    parse, rule = _parser(OPERATORS[name], hints[field])
    try:
        return parse(text)
    except (ValueError, LookupError, ArithmeticError):
        raise UserError(f"{name} has {field} {show(text)}; it must be {rule}.") from None


def _parser(kind: type[Growth], hint: Any) -> tuple[Callable[[str], Any], str]:
    """Returns what reads a field of an operator, and what its text must be."""
    choices = typing.get_args(hint)
    if typing.get_origin(hint) is Literal:
        return {choice: choice for choice in choices}.__getitem__, f"one of {_list(choices)}"
    if kind is LayerMap:
        return _parse_layers, "a pattern such as 12-3*2, or a list from 0 such as [0,1,1,2]"
    if Fraction in choices:
        return _parse_ratio, "a whole number, or a ratio such as 3/2"
    if types.NoneType in choices:
        return _parse_optional, "a whole number, or none"
    return (_parse_float, "a number") if hint is float else (_parse_int, "a whole number")


def _parse_layers(text: str) -> tuple[int, ...] | str:
    is_list = text.startswith("[") and text.endswith("]")
    return tuple(_parse_int(item) for item in text[1:-1].split(",")) if is_list else text


def _parse_ratio(text: str) -> int | Fraction:
    if _RATIO.fullmatch(text) is None:
        raise ValueError
    ratio = Fraction(text)
    return int(ratio) if ratio.denominator == 1 else ratio


def _parse_optional(text: str) -> int | None:
    return None if text.lower() == "none" else _parse_int(text)


def _parse_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError
    return value


def _parse_int(text: str) -> int:
    digits = text.strip().replace("_", "")
    if digits.isdecimal():
        return int(digits)  # a float would round
    value = float(digits)
    if value != int(value):
        raise ValueError
    return int(value)


def _split(text: str, mark: str) -> list[str]:
    """Returns the parts of a text between the marks that are in no parentheses."""
    parts, depth = [""], 0
    for character in text:
        depth += {"(": 1, "[": 1, ")": -1, "]": -1}.get(character, 0)
        if character == mark and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def _list(names: Any) -> str:
    return ", ".join(str(name) for name in names)
