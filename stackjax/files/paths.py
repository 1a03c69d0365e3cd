"""Paths from untrusted files, such as an index or a manifest, kept inside a directory."""

import os
import re
from pathlib import Path

from etils import epath

from stackjax.files.storage import is_remote
from stackjax.runtime.errors import UserError

_UNWRITABLE = re.compile("[\0\ud800-\udfff]")
_MAX_NAME = 255
"""Maximum number of bytes in a file name on common file systems."""


def file_inside(directory: epath.PathLike, name: object, named_by: str) -> epath.Path:
    """Returns the path of a file in a directory; the file may be missing.

    Symbolic links out of the directory are refused, except links in the Hugging Face Hub
    cache from `snapshots/` to `blobs/`.

    Args:
      named_by: The file with this name inside, for the error message.

    Raises:
      UserError: The path leaves the directory, or is not a regular file.
    """
    if not isinstance(name, str) or not _is_relative(name):
        raise UserError(
            f"{named_by} names the file {str(name)[:_MAX_NAME]!r}, which is not a file name "
            f"inside {os.fspath(directory)}; no file outside this directory is read."
        )
    path = epath.Path(directory) / name
    if not is_remote(path):
        check_inside(Path(directory), Path(path), named_by)
    return path


def check_inside(directory: Path, path: Path, named_by: str) -> None:
    """Raises UserError if a path leaves a directory or is not a regular file."""
    root = directory.resolve()
    try:
        target = path.resolve(strict=path.is_symlink())
    except (OSError, RuntimeError) as error:  # RuntimeError: link loops before Python 3.13.
        raise UserError(f"{path}, named by {named_by}, is a broken link: {error}.") from error
    if not any(target.is_relative_to(place) for place in (root, *_hub_blobs(root))):
        raise UserError(
            f"{path}, named by {named_by}, is a link to {target}, outside {root}; copy the "
            f"file into this directory."
        )
    if target.exists() and not target.is_file():
        raise UserError(f"{path}, named by {named_by}, is not a regular file.")


def _is_relative(name: str) -> bool:
    parts = name.split("/")
    return not _UNWRITABLE.search(name) and all(
        part not in ("", ".", "..") and len(part.encode()) <= _MAX_NAME for part in parts
    )


def _hub_blobs(root: Path) -> list[Path]:
    """Returns the blob directory of a Hugging Face Hub snapshot, or an empty list."""
    return [parent.with_name("blobs") for parent in root.parents if parent.name == "snapshots"]
