"""Growth operators as text: `stack(4)`, `width_split(embed=2, mlp=3/2)+noise(0.2)`."""

import dataclasses
import math
import re
import types
import typing
from collections.abc import Callable
from fractions import Fraction
from typing import Any, Literal

from stackjax.growth.base import Growth, operators, snake_case
from stackjax.growth.composition import MAX_LINKS, chain
from stackjax.runtime.errors import UserError
from stackjax.runtime.ranges import show

_OPERATOR = re.compile(r"\s*(\w+)\s*\((.*)\)\s*", re.DOTALL)
# Without exponents, the length of the number is bounded.
_RATIO = re.compile(r"[\d.]+(/\d+)?")


def parse_growth(text: str) -> Growth:
    """Returns the growth for a text; `parse_growth(str(growth)) == growth`.

    Operators are joined by `+`, from first to last.

    Raises:
      UserError: The text is not a valid growth.

    >>> parse_growth("stack(2)+noise(0.2)")
    Chain(growths=(Stack(factor=2), Noise(alpha=0.2)))
    """
    parts, text = _split(text, "+"), show(text)
    if len(parts) > MAX_LINKS:
        raise UserError(f"growth {text} has {len(parts)} operators; the limit is {MAX_LINKS}.")
    return chain(*(_parse_operator(part, text) for part in parts))


def replace_field(growth: Growth, field: str, text: str) -> Growth:
    """Returns a growth with another value of a field; UserError for an unknown field."""
    if type(growth) not in operators().values():
        raise UserError(f"{growth} has several operators; write the whole growth.")
    return dataclasses.replace(growth, **{field: _parse_value(type(growth), field, text)})


def _parse_operator(part: str, text: str) -> Growth:
    match, known = _OPERATOR.fullmatch(part), operators()
    if match is None:
        raise UserError(
            f"growth {text}: cannot read {show(part)}; write operators with their fields, "
            f"joined by '+', as in 'width_split(embed=2, mlp=2, heads=2)+stack(2)'."
        )
    name, inside = match.groups()
    if name not in known:
        raise UserError(
            f"growth {text}: there is no operator {show(name)}; there are {_list(known)}, and "
            f"operators defined in the file of --config."
        )
    values = _parse_fields(known[name], inside, text)
    missing = [
        field.name
        for field in dataclasses.fields(known[name])
        if field.default is dataclasses.MISSING and field.name not in values
    ]
    if missing:
        raise UserError(f"growth {text}: {name} needs {_list(missing)}.")
    return known[name](**values)


def _parse_fields(kind: type[Growth], inside: str, text: str) -> dict[str, Any]:
    """Returns an operator's fields from the text between parentheses."""
    name, hints = snake_case(kind.__name__), _hints(kind)
    # A single text can have commas: `layer_map(1,2-(3..10))`.
    is_text = len(hints) == 1 and str in typing.get_args(*hints.values())
    values: dict[str, Any] = {}
    for place, item in enumerate([inside] if is_text else _split(inside, ",")):
        if not inside.strip():
            break
        key, equals, value = item.partition("=")
        if not equals:
            if place >= len(hints):
                raise UserError(f"growth {text}: {name} takes {_list(hints)}, no more.")
            key, value = list(hints)[place], item
        key = key.strip()
        if key in values:
            raise UserError(f"growth {text}: {name} has {show(key)} twice.")
        values[key] = _parse_value(kind, key, value.strip())
    return values


def _hints(kind: type[Growth]) -> dict[str, Any]:
    """Returns the type of each field."""
    hints = typing.get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def _parse_value(kind: type[Growth], field: str, text: str) -> Any:
    name, hints = snake_case(kind.__name__), _hints(kind)
    if field not in hints:
        raise UserError(f"{name} has no field {field!r}; it has {_list(hints)}.")
    parse, rule = _parser(hints[field])
    try:
        return parse(text)
    except (ValueError, LookupError, ArithmeticError):
        raise UserError(f"{name} has {field} {show(text)}; it must be {rule}.") from None


def _parser(hint: Any) -> tuple[Callable[[str], Any], str]:
    """Returns a parser for a type, and the rule for its text."""
    choices = typing.get_args(hint)
    if typing.get_origin(hint) is Literal:
        return {choice: choice for choice in choices}.__getitem__, f"one of {_list(choices)}"
    if hint is bool:
        return {"True": True, "False": False}.__getitem__, "True or False"
    if hint is str or str in choices:
        return _parse_text, "a text, or a list from 0 such as [0,1,1,2]"
    if Fraction in choices:
        return _parse_ratio, "a whole number, or a ratio such as 3/2"
    if types.NoneType in choices:
        return _parse_optional, "a whole number, or none"
    return (_parse_float, "a number") if hint is float else (_parse_int, "a whole number")


def _parse_text(text: str) -> tuple[int, ...] | str:
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
    """Returns the parts of a text between marks; marks in parentheses do not count."""
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
