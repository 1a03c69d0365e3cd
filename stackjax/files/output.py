"""Checks of output paths, before any computation."""

import os
from pathlib import Path

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
