"""User errors, which a command reports as one line without a traceback."""

import contextlib
import sys
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

_OUT_OF_MEMORY = "out of memory in "
_LESS_MEMORY = (
    "use more devices, or for a run a larger stages.N.accumulate or mesh.fsdp, stages.N.remat "
    "'full', or a smaller batch_size"
)


class UserError(ValueError):
    """A mistake for the user to fix.

    The message names the field, the value, the rule and the way out. Any other ValueError is a
    bug.
    """


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Reports errors other than bugs as one line, with exit code 2.

    These errors are `UserError`, `OSError`, a loss of NaN or infinity, too little memory, and a
    killed worker process. Any other exception is a bug and keeps the traceback. Ctrl-C prints
    a line too and exits with code 130.
    """
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        text, code = describe(error)
        if code == 1:
            raise
        print(text, file=sys.stderr)
        sys.exit(code)


@contextlib.contextmanager
def memory_used_by(place: Callable[[], str]) -> Iterator[None]:
    """Adds the place in the program to an out-of-memory error.

    Args:
      place: Returns the place, such as `stage 1, step 3`.
    """
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error):
            error.add_note(f"{_OUT_OF_MEMORY}{place()}")
        raise


def is_out_of_memory(error: BaseException) -> bool:
    """Returns whether the host or a device is out of memory."""
    # Compare names: commands without devices do not import JAX.
    is_jax = type(error).__name__ in ("JaxRuntimeError", "XlaRuntimeError")
    return isinstance(error, MemoryError) or (is_jax and "RESOURCE_EXHAUSTED" in str(error))


def describe(error: BaseException) -> tuple[str, int]:
    """Returns the message and exit code for an error; code 1 is a bug, with traceback."""
    if isinstance(error, KeyboardInterrupt):
        return "error: interrupted.", 130
    if is_out_of_memory(error):
        return f"error: {_out_of_memory_message(error)}", 2
    if isinstance(error, BrokenProcessPool):
        return (
            "error: a worker process was killed, perhaps for lack of memory; use fewer "
            "processes, or see the system log.",
            2,
        )
    if isinstance(error, UserError | OSError | FloatingPointError):
        # Messages from other libraries may have several lines.
        return f"error: {' '.join(str(error).splitlines())}", 2
    return "".join(traceback.format_exception(error)).rstrip(), 1


def _out_of_memory_message(error: BaseException) -> str:
    """Returns the out-of-memory message: place, size, way out."""
    said = str(error).removeprefix("RESOURCE_EXHAUSTED: ").splitlines()
    notes = getattr(error, "__notes__", ())  # JAX adds notes too
    places = [each for each in notes if each.startswith(_OUT_OF_MEMORY)]
    place = places[0] if places else f"{_OUT_OF_MEMORY}{Path(sys.argv[0]).stem}"
    reason = f" ({said[0].rstrip('.')})" if said else ""
    return f"{place}{reason}; {_LESS_MEMORY}."


def not_finite(name: str, where: str, dtype: str) -> UserError:
    """Returns the error for an array with NaN or infinity."""
    return UserError(
        f"{name} in {where} has NaN or infinity as {dtype}; choose another model, or pass "
        f"--allow-nonfinite to grow and convert."
    )
