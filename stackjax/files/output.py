"""Output files of commands: checks before any computation, and JSON."""

import json
import os
from pathlib import Path
from typing import Any

from etils import epath

from stackjax.files.storage import replace_text
from stackjax.runtime.errors import UserError


def check_writable(option: str, path: Path) -> None:
    """Raises UserError if the path of an output option is not writable."""
    parent = path.absolute().parent
    if not parent.is_dir():
        raise UserError(f"{option} is {path}, but there is no directory {parent}; create it.")
    if path.is_dir():
        raise UserError(f"{option} is {path}, a directory; name a file in it.")
    place, mode = (path, os.W_OK) if path.exists() else (parent, os.W_OK | os.X_OK)
    if not os.access(place, mode):
        raise UserError(f"{option} is {path}, which is not writable; name another file.")


def check_new_file(option: str, path: Path) -> None:
    """Raises UserError if the path of an output option exists or is not writable."""
    check_writable(option, path)
    if os.path.lexists(path):
        raise UserError(f"{option} {path} exists already; name another file with --{option}.")


def check_output_directory(option: str, path: Path) -> None:
    """Raises UserError, with the name of the option, if no files can be written in a directory.

    The directory and its parents may be missing.
    """
    place = path.absolute()
    while not os.path.lexists(place):
        place = place.parent
    if not place.is_dir():
        raise UserError(f"{option} is {path}, but {place} is a file; name a directory.")
    if not os.access(place, os.W_OK | os.X_OK):
        raise UserError(f"{option} is {path}, but {place} is not writable; name another.")


def write_json(path: Path, value: Any) -> None:
    """Writes a value as JSON, atomically."""
    replace_text(epath.Path(path), json.dumps(value, indent=1) + "\n")
