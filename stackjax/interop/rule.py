"""Rules for JSON fields: type, range and supported values."""

import dataclasses
import sys
from collections.abc import Mapping
from typing import Any

from stackjax.runtime.errors import UserError

_NAMES = {int: "an integer", float: "a float", bool: "true or false", str: "a text"} | {
    list: "a list",
    dict: "an object",
}
_MAX_SHOWN = 80
"""Longest value in an error message, in characters."""


@dataclasses.dataclass(frozen=True)
class Rule:
    """Allowed values for a field."""

    types: tuple[type, ...] = ()
    """Allowed types, compared exactly (`True` is not an integer); empty allows every type."""
    low: float = -sys.float_info.max
    """Smallest number."""
    high: float = sys.float_info.max
    """Largest number; NaN and infinity are never in range."""
    or_null: bool = False
    """Whether null is allowed."""
    supported: tuple[Any, ...] | None = None
    """Values with an equivalent in stackjax; None means all."""

    def allows(self, value: Any) -> bool:
        """Returns whether a value has an allowed type and is in range."""
        if value is None or not self.types:
            return self.or_null or not self.types
        if type(value) not in self.types:
            return False
        return type(value) not in (int, float) or self.low <= value <= self.high

    def __str__(self):
        names = " or ".join(_NAMES[kind] for kind in self.types)
        if self.types == (int, float):
            names = "a number"
        if self.low > 0 and self.low == sys.float_info.min:
            names += " above 0"
        elif self.low > -sys.float_info.max:
            names += f" from {self.low:.16g}"
        if self.high < sys.float_info.max:
            names += f" to {self.high:.16g}"
        return f"{names} or null" if self.or_null else names


def check_fields(fields: Mapping[str, Any], rules: Mapping[str, Rule], where: str) -> None:
    """Raises UserError if a field breaks a rule; absent fields pass.

    Args:
      where: File name for messages.
    """
    for name, rule in rules.items():
        if name not in fields:
            continue
        value = fields[name]
        if not rule.allows(value):
            raise UserError(f"{where}: {name} is {shown(value)}; it must be {rule}.")
        if rule.supported is not None and value not in rule.supported:
            raise UserError(
                f"{where} has {name} {shown(value)}, which stackjax cannot represent."
            )


def shown(value: Any) -> str:
    """Returns a value's repr, shortened for error messages."""
    text = repr(value)
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."
