"""Input files on disks and in buckets: opening, listing, and versions."""

import contextlib
import glob
import io
import os
from collections.abc import Iterator
from typing import Any, BinaryIO

from fsspec.core import url_to_fs

from stackjax.files.storage import is_remote

BUFFER_BYTES = 2**20
Stamp = tuple[int, int]
"""Size in bytes, and a number that changes with the contents."""


@contextlib.contextmanager
def open_input(path: str) -> Iterator[BinaryIO]:
    """Yields a file for reading; in a bucket, parts are requested as they are read."""
    if not is_remote(path):
        with open(path, "rb") as file:
            yield file
        return
    file_system, name = _file_system(path)
    with file_system.open(name, "rb") as file:
        yield io.BufferedReader(file, BUFFER_BYTES)


def stamp_of(path: str) -> Stamp:
    """Returns a file's stamp; FileNotFoundError if the file is missing."""
    if is_remote(path):
        file_system, name = _file_system(path)
        return file_system.info(name)["size"], int(file_system.checksum(name))
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns


def is_directory(path: str) -> bool:
    """Returns whether a path is a directory; in a bucket, a prefix of objects."""
    if is_remote(path):
        file_system, name = _file_system(path)
        return file_system.isdir(name)
    return os.path.isdir(path)


def is_there(path: str) -> bool:
    """Returns whether a file exists; broken links do."""
    if is_remote(path):
        file_system, name = _file_system(path)
        return file_system.exists(name)
    return os.path.lexists(path)


def match_files(pattern: str) -> list[str]:
    """Returns the files that match a glob, sorted."""
    if is_remote(pattern):
        file_system, name = _file_system(pattern)
        found = file_system.glob(name, detail=True)
        names = (name for name, info in found.items() if info["type"] == "file")
        return sorted(file_system.unstrip_protocol(name) for name in names)
    # `**/**` finds a file several times.
    found = set(glob.glob(pattern, recursive=True))
    return sorted(path for path in found if not os.path.isdir(path))


def walk_files(directory: str) -> Iterator[str]:
    """Yields the names of all files below a directory, relative to it, in any order.

    Hidden files, and files in hidden directories, are left out.
    """
    if is_remote(directory):
        file_system, root = _file_system(directory)
        names = (name[len(root.rstrip("/")) + 1 :] for name in file_system.find(root))
    else:
        names = (
            os.path.relpath(os.path.join(place, name), directory)
            for place, _, files in os.walk(directory, followlinks=True)
            for name in files
        )
    for name in names:
        if name and not any(part.startswith(".") for part in name.split("/")):
            yield name


def _file_system(path: str) -> tuple[Any, str]:
    return url_to_fs(path)
