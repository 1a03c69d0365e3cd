"""What a person sees of their own mistakes: one line."""

import contextlib
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

_ROOT = Path(__file__).parent.parent
_OURS = (str(_ROOT / "stackjax"), str(_ROOT / "scripts"))


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Ends the command with one line and exit code 2 where the user can mend the cause.

    That is a ValueError raised by stackjax itself or by its scripts, a file system that
    fails, or a loss that is no longer finite; all else is a fault of the code and keeps its
    traceback. Ctrl-C ends it with one line and exit code 130.
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
    """Returns what is said of an error, and the exit code: 1 with a traceback."""
    if isinstance(error, KeyboardInterrupt):
        return "error: interrupted.", 130
    raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
    ours = isinstance(error, ValueError) and raised_in.startswith(_OURS)
    if ours or isinstance(error, OSError | FloatingPointError):
        # Messages of others may have several lines.
        return f"error: {' '.join(str(error).splitlines())}", 2
    return "".join(traceback.format_exception(error)).rstrip(), 1
