"""A directory that is complete or absent: written beside its place, then renamed."""

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path


def refuse_existing(output: Path) -> None:
    """Raises FileExistsError where the output is more than an empty directory."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(
            f"output {str(output)!r} exists already; remove it or name another one."
        )


@contextlib.contextmanager
def staging_directory(output: Path) -> Iterator[Path]:
    """Yields an empty directory that becomes the output when the block succeeds.

    No other process writes into it meanwhile. It is removed when the block fails; what a
    killed run has left in it is removed first.
    """
    staging = output.parent / f".{output.name}.unfinished"
    lock = _lock_directory(staging)
    try:
        refuse_existing(output)
        _clear(staging)
        yield staging
        staging.rename(output)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    finally:
        os.close(lock)


def _clear(directory: Path) -> None:
    for path in directory.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _lock_directory(directory: Path) -> int:
    """Makes a directory and returns a descriptor that holds its lock; waits for it.

    The kernel releases the lock of a process that dies.
    """
    while True:
        directory.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(directory, os.O_RDONLY)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(directory)):
                return descriptor
        # Whoever held the lock has finished and renamed or removed the directory.
        os.close(descriptor)
