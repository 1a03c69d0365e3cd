"""Rules for the fields of a JSON file: their types, ranges and values."""

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
"""Letters of a value that an error shows."""


@dataclasses.dataclass(frozen=True)
class Rule:
    """The values that a field may have."""

    types: tuple[type, ...] = ()
    """The types, exactly: true is no integer. Any type if empty."""
    low: float = -sys.float_info.max
    """The smallest number."""
    high: float = sys.float_info.max
    """The largest number. NaN and infinities are outside of every range."""
    or_null: bool = False
    """Whether null is allowed too."""
    supported: tuple[Any, ...] | None = None
    """The values that stackjax can represent; None if it can represent all of them."""

    def allows(self, value: Any) -> bool:
        """Returns whether a value has the right type and lies in the range."""
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
    """Raises UserError if a field breaks its rule; a field that is absent breaks none.

    Args:
      where: The file, for errors.
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
    """Returns a value as an error shows it: not more than a few words."""
    text = repr(value)
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."
