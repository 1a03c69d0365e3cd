"""All-or-nothing directories: written to a staging directory, then renamed.

In a bucket, the directory is complete once the last file is uploaded.
"""

import contextlib
import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path

from etils import epath

UPLOADS_AT_A_TIME = 8
UPLOADING = ".uploading"


def refuse_existing(output: epath.Path) -> None:
    """Raises FileExistsError if the output exists and is not an empty directory.

    Leftovers from a killed upload are allowed.
    """
    if (output / UPLOADING).exists():
        return
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(
            f"output {str(output)!r} exists already; remove it or name another one."
        )


@contextlib.contextmanager
def staging_directory(output: epath.Path) -> Iterator[Path]:
    """Yields an empty directory, renamed to `output` when the block succeeds.

    A lock keeps other processes out. A failed block removes the directory; leftovers from a
    killed run are removed first.
    """
    staging = Path(output.parent / f".{output.name}.unfinished")
    lock = lock_directory(staging)
    try:
        refuse_existing(output)
        clear_directory(epath.Path(staging))
        yield staging
        staging.rename(output)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    finally:
        os.close(lock)


@contextlib.contextmanager
def resumable_directory(staging: Path, output: epath.Path, finished: str) -> Iterator[Path]:
    """Yields the directory `staging` as an earlier run left it; removed after success.

    A lock keeps other processes out. After a failure, files that match the glob `finished` keep
    the directory for the next run. Otherwise the directory is removed.

    Raises:
      FileExistsError: The output exists.
    """
    lock = lock_directory(staging)
    try:
        _refuse_existing_or_remove(output, staging)
        yield staging
        shutil.rmtree(staging, ignore_errors=True)
    except BaseException:
        if count := sum(1 for _ in staging.glob(finished)):
            print(f"kept: {count} finished parts in {staging}; the same command goes on there")
        else:
            shutil.rmtree(staging, ignore_errors=True)
        raise
    finally:
        os.close(lock)


def _refuse_existing_or_remove(output: epath.Path, staging: Path) -> None:
    try:
        refuse_existing(output)
    except FileExistsError:
        # Left by a run that was killed after the output was complete.
        shutil.rmtree(staging, ignore_errors=True)
        raise


def upload(directory: Path, output: epath.Path, last: str) -> None:
    """Uploads the files of a directory, with the file `last` after all others.

    After a killed upload of the same files, only missing files are uploaded. Any other
    leftovers are overwritten or removed.

    Args:
      last: A file that determines the contents of all others.

    Raises:
      FileExistsError: The output has any other files.
    """
    refuse_existing(output)
    identity = hashlib.sha256((directory / last).read_bytes()).hexdigest()
    marker, text = output / UPLOADING, f"Incomplete: the upload of {identity} has not ended.\n"
    goes_on = marker.exists() and marker.read_text() == text
    if not goes_on:
        marker.write_text(text)
    names = sorted(path.name for path in directory.iterdir())

    def send(name: str) -> None:
        source, target = epath.Path(directory / name), output / name
        # In a bucket, a file is complete or absent.
        is_there = goes_on and target.exists()
        if not (is_there and target.stat().length == source.stat().length):
            source.copy(target, overwrite=True)

    with futures.ThreadPoolExecutor(UPLOADS_AT_A_TIME) as pool:
        list(pool.map(send, (name for name in names if name != last)))
    send(last)
    for path in output.iterdir():
        if path.name not in names:
            path.unlink(missing_ok=True)


def clear_directory(directory: epath.Path, keep: str = "") -> None:
    """Removes everything in a directory, on a disk or in a bucket, except the name `keep`."""
    for path in directory.iterdir():
        if path.name != keep:
            path.rmtree() if path.is_dir() else path.unlink()


def lock_directory(directory: Path) -> int:
    """Creates a directory, waits for the lock, and returns the locked file descriptor.

    The kernel releases the lock if the process dies.
    """
    while True:
        directory.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(directory, os.O_RDONLY)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(directory)):
                return descriptor
        # The previous holder has renamed or removed the directory.
        os.close(descriptor)
