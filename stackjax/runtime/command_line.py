"""Options from a command line, with each mistake in them as a single line."""

import contextlib
import difflib
import io
import re
import sys
from collections.abc import Sequence
from typing import Any

import tyro
from tyro import _errors as mistakes  # without a public name, so requirements.txt pins tyro

from stackjax.runtime.errors import UserError
from stackjax.runtime.ranges import show

_OPTION = re.compile(r"--[a-z][\w.-]*")
_VALUES = re.compile(r"(?:instantiated from|for arguments:) \[(.*)\]")
"""Values of an option with several types or items, in an error of tyro."""


def parse(kind: Any, *, prog: str, args: Sequence[str] | None = None, **settings: Any) -> Any:
    """Returns an instance of a dataclass, with its fields from a command line.

    Args:
      prog: The command, for the help.
      args: By default the arguments of this process.
      settings: Further arguments of `tyro.cli`.

    Raises:
      UserError: An option is unknown or missing, or its value is wrong.
      SystemExit: The help was asked for, and is printed.
    """

    def refuse(event: mistakes.ParseErrorEvent) -> None:
        if isinstance(event, mistakes.InstantiationFailure) and event.argument is None:
            _raise_cause()
        mistake = _mistake(event)
        if isinstance(event, mistakes.UnrecognizedArgs):
            mistake += _suggestion(event.tokens, _options(kind, **settings))
        raise UserError(f"{mistake}; see `{prog} --help`.") from None

    with mistakes.on_parse_error(refuse):
        return tyro.cli(kind, prog=prog, args=args, **settings)


def _raise_cause() -> None:
    """Raises the error of a constructor, which tyro is handling, as it was."""
    error = sys.exception()
    while error is not None and not isinstance(error, ValueError):
        error = error.__context__
    if error is not None:
        raise error


def _mistake(event: mistakes.ParseErrorEvent) -> str:
    """Returns a clause about what is wrong with a command line."""
    match event:
        case mistakes.UnrecognizedArgs():
            return f"{show(' '.join(event.tokens))} is not an option or a value of an option"
        case mistakes.MissingArgs():
            missing = [each.arg.display_name() for each in event.missing_arguments]
            return f"{' and '.join(missing)} must be given"
        case mistakes.InvalidChoice():
            choices = " or ".join(map(repr, event.choices))
            return f"{_name(event)} is {show(event.value)}; it must be {choices}"
        case mistakes.BadValue():
            return f"{_name(event)} must have a value, {_metavar(event)}"
        case mistakes.InstantiationFailure():
            reason, *_ = event.message.splitlines()
            values = _VALUES.search(reason)
            is_wrong = f" is {values[1]}" if values else f": {reason.rstrip('.')}"
            rule = "" if ";" in is_wrong else f"; it must be {_metavar(event)}"
            return f"{_name(event)}{is_wrong}{rule}"
    return f"these arguments do not fit together ({type(event).__name__})"


def _name(event: Any) -> str:
    return event.argument.display_name()


def _metavar(event: Any) -> str:
    return event.argument.lowered.metavar


def _suggestion(tokens: Sequence[str], options: Sequence[str]) -> str:
    """Returns the option that was perhaps meant, in parentheses, or nothing."""
    wrong = [token.partition("=")[0].replace("_", "-") for token in tokens]
    close = [each for name in wrong for each in difflib.get_close_matches(name, options, 1)]
    return f" (perhaps {close[0]} is meant)" if close else ""


def _options(kind: Any, **settings: Any) -> list[str]:
    """Returns the name of every option, from the help."""
    with contextlib.redirect_stdout(io.StringIO()) as shown, contextlib.suppress(SystemExit):
        tyro.cli(kind, args=["--help"], **settings)
    return _OPTION.findall(shown.getvalue())
