"""Ranges for config fields: numbers, texts and tuples."""

import dataclasses
import math
import operator
import reprlib
import sys
from collections.abc import Callable
from fractions import Fraction
from typing import Any, ClassVar

import numpy as np
import tyro

from stackjax.runtime.errors import UserError

_SHOWN = reprlib.Repr()
_SHOWN.maxstring = _SHOWN.maxother = 100
_MAX_BITS = 128
"""Messages show only the number of digits of longer integers."""
_MAX_FLOAT32 = float(np.finfo(np.float32).max)
_MIN_FLOAT32 = float(np.finfo(np.float32).tiny)
"""The smallest normal float32; devices round smaller numbers to 0."""
_LARGE = 1000
"""`--help` leaves larger upper bounds out: their only purpose is exact arithmetic."""


class Range(tyro.constructors.PrimitiveConstructorSpec[Any]):
    """A range for a numeric field, with a parser for the command line."""

    kinds: ClassVar[tuple[type, ...]]
    read: ClassVar[Callable[[str], Any]]
    """Parses a text; raises ValueError or ZeroDivisionError."""
    noun: ClassVar[str]
    text_noun: ClassVar[str]
    """The noun in a message about a text without a number."""
    metavar_name: ClassVar[str]

    def __init__(
        self,
        *,
        at_least: float | None = None,
        more_than: float | None = None,
        at_most: float | None = None,
        less_than: float | None = None,
    ):
        bounds = (
            ("at least", ">=", operator.ge, at_least),
            ("more than", ">", operator.gt, more_than),
            ("at most", "<=", operator.le, at_most),
            ("less than", "<", operator.lt, less_than),
        )
        self.bounds = tuple(
            (words, sign, compare, limit)
            for words, sign, compare, limit in bounds
            if limit is not None
        )
        shown = [f"{sign} {limit}" for _, sign, _, limit in self.bounds if abs(limit) <= _LARGE]
        super().__init__(
            nargs=1,
            metavar=f"{self.metavar_name} {', '.join(shown)}".strip(),
            instance_from_str=lambda text: self.parse(text[0]),
            is_instance=lambda value: type(value) in self.kinds,
            str_from_instance=lambda value: [str(value)],
        )

    def parse(self, text: str) -> Any:
        """Returns the number in a text; UserError for any other text."""
        try:
            return type(self).read(text)
        except (ValueError, ZeroDivisionError):
            raise UserError(f"{show(text)} is not {self.text_noun}") from None

    def accepts(self, value: Any) -> bool:
        """Returns whether a value has the right type, is finite, and is within the bounds."""
        is_number = type(value) in self.kinds and abs(value) <= sys.float_info.max
        return is_number and self.includes(value)

    def includes(self, value: Any) -> bool:
        """Returns whether a number is within the bounds."""
        return all(compare(value, limit) for _, _, compare, limit in self.bounds)

    def rule(self, value: Any = None) -> str:
        """Returns the rule for a value outside the range."""
        is_number = type(value) in self.kinds and value == value
        words = " and ".join(
            f"{words} {limit}"
            for words, _, compare, limit in self.bounds
            if abs(limit) <= _LARGE or (is_number and not compare(value, limit))
        )
        is_outside = is_number and not self.includes(value)
        return words if is_outside else ", ".join(filter(None, (self.noun, words)))


class Whole(Range):
    """Integers; the command line also takes 2e6."""

    kinds = (int,)
    noun = text_noun = "a whole number"
    metavar_name = "INT"

    @staticmethod
    def read(text: str) -> int:
        digits = text.replace("_", "")
        if digits.lstrip("+-").isdecimal():
            return int(digits)
        value = float(digits)
        if not value.is_integer():
            raise ValueError
        return int(value)


class Real(Range):
    """Numbers within the bounds, also after rounding to float32."""

    kinds = (float, int)
    read = float
    noun = "a number that float32 can hold"
    text_noun = "a number"
    metavar_name = "FLOAT"

    def accepts(self, value: Any) -> bool:
        if not super().accepts(value):
            return False
        fits = value == 0 or _MIN_FLOAT32 <= abs(value) <= _MAX_FLOAT32
        return fits and self.includes(float(np.float32(value)))


class Rational(Range):
    """Integers and exact fractions."""

    kinds = (int, Fraction)
    read = Fraction
    noun = "a whole number or a Fraction"
    text_noun = "a ratio"
    metavar_name = "RATIO"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Length:
    """A range for the length of a tuple or text."""

    at_least: int = 1
    at_most: int

    def accepts(self, value: Any) -> bool:
        """Returns whether a value has an allowed length."""
        return self.at_least <= len(value) <= self.at_most

    def rule(self, value: Any = None) -> str:
        """Returns the rule for a value with a wrong length."""
        return f"from {self.at_least} to {self.at_most} long"


def show(value: Any) -> str:
    """Returns the text of a value, shortened to a single line."""
    if isinstance(value, int) and value.bit_length() > _MAX_BITS:
        return f"a number of {int(value.bit_length() * math.log10(2)) + 1} digits"
    shown = str(value) if isinstance(value, Fraction) else _SHOWN.repr(value)
    return " ".join(shown.split())
