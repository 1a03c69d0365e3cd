"""The text field in a row, and rows without a readable text."""

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any, Literal

from stackjax.data.token_documents import TokenRules
from stackjax.runtime.errors import UserError

Treatment = Literal["refuse", "skip"]
Reason = Literal[
    "null text",
    "no text field",
    "not UTF-8",
    "not text",
    "not JSON",
    "not a JSON object",
    "nested too deep",
    "text is not a string",
    "text field given twice",
    "damaged rest of a file",
    "no tokens",
]
"""Why a document is left out."""
NO_TOKENS: Reason = "no tokens"
"""Documents without tokens are always left out."""
MISSING: tuple[Reason, ...] = ("null text", "no text field")
"""Reasons under `on_missing`; the others are under `on_invalid`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reading:
    """How documents are read."""

    text_field: str = "text"
    """The field, column or feature with the text, possibly a dotted path."""
    on_missing: Treatment = "refuse"
    """Treatment of null texts and missing fields."""
    on_invalid: Treatment = "refuse"
    """Treatment of unreadable rows."""
    tokens: TokenRules | None = None
    """The tokenizer's rules, for files with tokens."""

    def is_refused(self, reason: str) -> bool:
        """Returns whether a row is an error for a reason."""
        if reason == NO_TOKENS:
            return False
        return (self.on_missing if reason in MISSING else self.on_invalid) == "refuse"


@dataclasses.dataclass(frozen=True)
class LeftOut:
    """A skipped row."""

    reason: Reason


class BadRow(UserError):
    """A row, or the rest of a file, without a readable text."""

    def __init__(self, message: str, reason: Reason):
        super().__init__(message)
        self.reason: Reason = reason


def leave_out(error: BadRow, reading: Reading, place: Callable[[], str]) -> LeftOut:
    """Returns the skipped row.

    Args:
      place: Returns file and row, for the error message.

    Raises:
      UserError: Such rows are refused.
    """
    if not reading.is_refused(error.reason):
        return LeftOut(error.reason)
    option = "missing" if error.reason in MISSING else "invalid"
    message = str(error).rstrip(".")
    raise UserError(f"{place()}: {message}; --on-{option} skip leaves it out.") from error


def find_field(row: Mapping[str, Any], text_field: str) -> Any:
    """Returns the value of a field; a name with dots is also a path into nested fields.

    A field whose name has the dots wins.

    Raises:
      BadRow: The field is missing.
    """
    if text_field in row:
        return row[text_field]
    value: Any = row
    for name in text_field.split("."):
        if value is None:
            return None
        if not isinstance(value, Mapping) or name not in value:
            raise no_field(list(row), text_field)
        value = value[name]
    return value


def no_field(names: Collection[str], text_field: str) -> BadRow:
    """Returns the error for a missing field."""
    found = ", ".join(map(repr, names)) or "none"
    return BadRow(
        f"no field {text_field!r}, only {found:.300}; name the field with the text with "
        f"--text-field.",
        "no text field",
    )


def text_of(value: object, text_field: str) -> str:
    """Returns the text in a field.

    Unpaired surrogates (valid in JSON, invalid in UTF-8) become `?`.

    Raises:
      BadRow: The value is not a text.
    """
    match value:
        case str():
            return value.encode("utf-8", "replace").decode("utf-8")
        case bytes():
            try:
                return value.decode("utf-8")
            except UnicodeDecodeError as error:
                message = f"the field {text_field!r} is not UTF-8: {error}."
                raise BadRow(message, "not UTF-8") from error
        case None:
            message = f"the field {text_field!r} is not a text but null."
            raise BadRow(message, "null text")
        case _:
            message = f"the field {text_field!r} is not a text: {value!r:.40}."
            raise BadRow(message, "text is not a string")
