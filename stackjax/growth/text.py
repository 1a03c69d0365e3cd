"""The textual form of growths: `stack(4)`, `width_split(embed=2, mlp=3/2)+noise(0.2)`."""

import dataclasses
import re
import types
import typing
from fractions import Fraction
from typing import Any, Literal

from stackjax.growth.base import Growth, chain
from stackjax.growth.depth import (
    DepthUpscale,
    DepthZero,
    InsertBlock,
    Interleave,
    LayerMap,
    Stack,
)
from stackjax.growth.learned import Learn
from stackjax.growth.masked import DepthRandom, WidthRandom
from stackjax.growth.noise import Noise
from stackjax.growth.width import WidthSplit, WidthZero

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


def parse_growth(text: str) -> Growth:
    """Returns the growth that a text describes: `parse_growth(str(growth)) == growth`.

    Operators are joined by `+`, from first to last.

    Raises:
      ValueError: The text cannot be read, or describes no growth that there can be.

    >>> parse_growth("stack(2)+noise(0.2)")
    Chain(growths=(Stack(factor=2), Noise(alpha=0.2)))
    """
    growths = [_parse_operator(part, text) for part in _split(text, "+")]
    return growths[0] if len(growths) == 1 else chain(*growths)


def replace_field(growth: Growth, field: str, text: str) -> Growth:
    """Returns a growth with one field as a text says; ValueError if it has no such field."""
    name = next((name for name, kind in OPERATORS.items() if type(growth) is kind), None)
    if name is None:
        raise ValueError(f"{growth} has no fields of its own; write the whole growth.")
    return dataclasses.replace(growth, **{field: _parse_value(name, field, text)})


def _parse_operator(part: str, text: str) -> Growth:
    match = _OPERATOR.fullmatch(part)
    if match is None:
        raise ValueError(
            f"growth {text!r}: cannot read {part!r}; write operators with their fields, joined "
            f"by '+', as in 'width_split(embed=2, mlp=2, heads=2)+stack(2)'."
        )
    name, inside = match.groups()
    if name not in OPERATORS:
        raise ValueError(
            f"growth {text!r}: there is no operator {name!r}; there are {_list(OPERATORS)}."
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
                raise ValueError(f"growth {text!r}: {name} takes {_list(names)}, no more.")
            key, value = names[place], item
        key = key.strip()
        if key in values:
            raise ValueError(f"growth {text!r}: {name} is given {key} twice.")
        values[key] = _parse_value(name, key, value.strip())
    missing = [
        field.name
        for field in dataclasses.fields(kind)
        if field.default is dataclasses.MISSING and field.name not in values
    ]
    if missing:
        raise ValueError(f"growth {text!r}: {name} needs {_list(missing)}.")
    return kind(**values)


def _parse_value(name: str, field: str, text: str) -> Any:
    hints = typing.get_type_hints(OPERATORS[name])
    if field not in hints:
        raise ValueError(f"{name} has no field {field!r}; it has {_list(hints)}.")
    if OPERATORS[name] is LayerMap:
        is_tuple = text.startswith("[") and text.endswith("]")
        return tuple(_parse_int(item) for item in text[1:-1].split(",")) if is_tuple else text
    hint = hints[field]
    choices = typing.get_args(hint)
    try:
        if typing.get_origin(hint) is Literal:
            if text not in choices:
                raise ValueError(f"one of {_list(choices)}")
            return text
        if types.NoneType in choices and text == "none":
            return None
        if Fraction in choices:
            ratio = Fraction(text)
            return int(ratio) if ratio.denominator == 1 else ratio
        return float(text) if hint is float else _parse_int(text)
    except (ValueError, ZeroDivisionError) as error:
        kinds = {float: "a number", int: "a whole number"}
        rule = kinds.get(hint, "a whole number, or a ratio such as 3/2")
        if typing.get_origin(hint) is Literal:
            rule = str(error)
        raise ValueError(f"{name} has {field} {text!r}; it must be {rule}.") from None


def _parse_int(text: str) -> int:
    value = float(text.replace("_", ""))
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
