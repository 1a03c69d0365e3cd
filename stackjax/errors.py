"""What a person sees of their own mistakes: one line."""

import contextlib
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

_PACKAGE = str(Path(__file__).parent)


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Ends the command with one line and exit code 2 where the user can mend the cause.

    That is a ValueError raised by stackjax itself, a file system that fails, or a loss
    that is no longer finite; all else is a fault of the code and keeps its traceback.
    Ctrl-C ends it with one line and exit code 130.
    """
    try:
        yield
    except KeyboardInterrupt:
        print("error: interrupted.", file=sys.stderr)
        sys.exit(130)
    except (OSError, FloatingPointError) as error:
        _exit(error)
    except ValueError as error:
        raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
        if not raised_in.startswith(_PACKAGE):
            raise
        _exit(error)


def _exit(error: Exception) -> None:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)
