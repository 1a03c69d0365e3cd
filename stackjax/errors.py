"""User errors, which a command reports as one line without a traceback."""

import contextlib
import sys
import traceback
from collections.abc import Iterator


class UserError(ValueError):
    """A mistake that the user can fix.

    The message names the field, its value, the rule and the way out. Any other ValueError
    is a bug.
    """


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Ends the command with one line and exit code 2 if the user can fix the error.

    That is a `UserError`, a file system that fails, or a loss that is not finite. Any other
    exception is a bug and keeps its traceback. Ctrl-C exits with one line and code 130.
    """
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        text, code = describe(error)
        if code == 1:
            raise
        print(text, file=sys.stderr)
        sys.exit(code)


def describe(error: BaseException) -> tuple[str, int]:
    """Returns the text of an error and its exit code; code 1 means a bug, with traceback."""
    if isinstance(error, KeyboardInterrupt):
        return "error: interrupted.", 130
    if isinstance(error, UserError | OSError | FloatingPointError):
        # Messages of other libraries may have several lines.
        return f"error: {' '.join(str(error).splitlines())}", 2
    return "".join(traceback.format_exception(error)).rstrip(), 1
