"""Python files of the user, such as configs."""

import contextlib
import importlib.util
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from stackjax.runtime.errors import UserError

_HELPERS: dict[str, Path] = {}
"""The directory of each module imported from beside a user's file."""


def load_function(path: Path, name: str) -> Callable[..., Any] | None:
    """Returns a function in a Python file; None if there is no such function.

    The file can import modules in the same directory.

    Raises:
      UserError: The file is missing or fails. The function raises UserError if it fails.
    """
    if not path.is_file():
        raise UserError(
            f"--config {path}: there is no such file; write a Python file with "
            f"get_config(), or copy one from configs/ in the repository of stackjax."
        )
    # Under the path as a name, no other module is in the way.
    spec = importlib.util.spec_from_file_location(str(path.resolve()), path)
    if spec is None or spec.loader is None:
        raise UserError(f"--config {path}: a config is a Python file, named *.py.")
    module = importlib.util.module_from_spec(spec)
    # Type hints of dataclasses are resolved in `sys.modules`.
    sys.modules[spec.name] = module
    with _running(path):
        spec.loader.exec_module(module)
    function = getattr(module, name, None)
    return _running(path)(function) if callable(function) else None


@contextlib.contextmanager
def _running(path: Path) -> Iterator[None]:
    """Turns each error of a user's file into a UserError with file, line and reason."""
    with _imports_from(path.resolve().parent):
        try:
            yield
        except (UserError, KeyboardInterrupt):
            raise
        # User code can raise anything, and an exit is not a success.
        except BaseException as error:
            frames, file = traceback.extract_tb(error.__traceback__), path.resolve()
            lines = [frame.lineno for frame in frames if Path(frame.filename).resolve() == file]
            where = f", line {lines[-1]}" if lines else ""  # a SyntaxError has its own line
            reason = traceback.TracebackException.from_exception(error)  # never fails
            raise UserError(
                f"--config {path}{where}: {type(error).__name__}: {reason}"
            ) from error


@contextlib.contextmanager
def _imports_from(directory: Path) -> Iterator[None]:
    """Makes modules in a directory importable, instead of modules of earlier directories."""
    for name in [name for name, owner in _HELPERS.items() if owner != directory]:
        sys.modules.pop(name, None)
        del _HELPERS[name]
    before = set(sys.modules)
    sys.path.insert(0, str(directory))
    try:
        yield
    finally:
        sys.path.remove(str(directory))
        for name in sys.modules.keys() - before:
            top = name.partition(".")[0]
            is_beside = (directory / top).is_dir() or (directory / f"{top}.py").is_file()
            if is_beside and top not in before:
                _HELPERS[name] = directory
