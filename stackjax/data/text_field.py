"""The text field in a row."""

from collections.abc import Iterable
from typing import Literal

from stackjax.runtime.errors import UserError

NullTexts = Literal["refuse", "skip"]


def check_names(names: Iterable[str], text_field: str) -> None:
    """Raises UserError if the text field is missing."""
    if text_field not in names:
        found = ", ".join(map(repr, names)) or "none"
        raise UserError(
            f"no field {text_field!r}, only {found:.300}; name the field with the text with "
            f"--text-field."
        )


def text_of(value: object, text_field: str, null_texts: NullTexts) -> str | None:
    """Returns the text in a field; None for a null text to skip.

    Unpaired surrogates (valid in JSON, invalid in UTF-8) become `?`.

    Raises:
      UserError: The value is not a text.
    """
    match value:
        case str():
            return value.encode("utf-8", "replace").decode("utf-8")
        case bytes():
            try:
                return value.decode("utf-8")
            except UnicodeDecodeError as error:
                raise UserError(f"the field {text_field!r} is not UTF-8: {error}.") from error
        case None if null_texts == "skip":
            return None
        case None:
            raise UserError(
                f"the field {text_field!r} is not a text but null; leave such rows out with "
                f"--null-texts skip."
            )
        case _:
            raise UserError(f"the field {text_field!r} is not a text: {value!r:.40}.")
