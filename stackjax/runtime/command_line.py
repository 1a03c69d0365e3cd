"""Command-line parsing; each mistake is reported as a single line."""

import contextlib
import difflib
import io
import re
import sys
from collections.abc import Sequence
from typing import Any

import tyro
from tyro import _errors as mistakes  # private, so requirements.txt pins tyro

from stackjax.runtime.errors import UserError
from stackjax.runtime.ranges import show

_OPTION = re.compile(r"--[a-z][\w.-]*")
_VALUES = re.compile(r"(?:instantiated from|for arguments:) \[(.*)\]")
"""The option's values in a tyro error, for an option with several types or items."""


def program(command: str) -> str:
    """Returns the words before the options of a command, as this process was called.

    `stackjax train` for the console script, else `python -m stackjax.train`.
    """
    is_script = sys.argv[0].partition(" ")[0] == "stackjax"
    return f"stackjax {command}" if is_script else f"python -m stackjax.{command}"


def silence_absl() -> None:
    """Turns off the log of Orbax and Grain, which also raise every error they log."""
    # Not at the top: `--help` does without.
    from absl import logging

    logging.set_verbosity(logging.FATAL)


def parse(kind: Any, *, prog: str, args: Sequence[str] | None = None, **settings: Any) -> Any:
    """Returns an instance of a dataclass, with fields from the command line.

    Args:
      prog: Name of the command in the help.
      args: Command-line arguments; `sys.argv[1:]` by default.
      settings: Further arguments for `tyro.cli`.

    Raises:
      UserError: An option is unknown or missing, or has a wrong value.
      SystemExit: `--help` has printed the help.
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
    """Raises the ValueError of a constructor again, from inside tyro's error handler."""
    error = sys.exception()
    while error is not None and not isinstance(error, ValueError):
        error = error.__context__
    if error is not None:
        raise error


def _mistake(event: mistakes.ParseErrorEvent) -> str:
    """Returns the message for a parse error, without a period."""
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
    """Returns the closest option in parentheses, or an empty text."""
    wrong = [token.partition("=")[0].replace("_", "-") for token in tokens]
    close = [each for name in wrong for each in difflib.get_close_matches(name, options, 1)]
    return f" (perhaps {close[0]} is meant)" if close else ""


def _options(kind: Any, **settings: Any) -> list[str]:
    """Returns all option names, read from the help text."""
    with contextlib.redirect_stdout(io.StringIO()) as shown, contextlib.suppress(SystemExit):
        tyro.cli(kind, args=["--help"], **settings)
    return _OPTION.findall(shown.getvalue())
