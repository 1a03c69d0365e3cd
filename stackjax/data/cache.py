"""Token shards copied to a local disk, once for all processes on a host."""

import contextlib
import functools
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent import futures
from pathlib import Path
from typing import NamedTuple

import jax
from etils import epath

from stackjax.data.lengths import hash_lengths
from stackjax.data.manifest import MANIFEST, Manifest, SplitName, read_manifest
from stackjax.data.shard_hash import hash_file
from stackjax.files.staging import lock_directory
from stackjax.files.storage import is_remote, replace_text
from stackjax.runtime.errors import UserError
from stackjax.runtime.progress_bar import progress_bar

COPIES_AT_A_TIME = 8


class _File(NamedTuple):
    """A file to copy."""

    name: str
    bytes: int
    hash: str
    hash_file: Callable[[Path], str]


def local_copy(path: str, split: SplitName, cache_dir: str) -> str:
    """Returns a directory in `cache_dir` with the shards for a split, copied if missing.

    Each file is hashed before the rename to the final name, so a copy is complete or absent.
    Existing copies with the right size are kept. The directory is named by the content digest,
    so a moved data set is not copied again.

    Raises:
      UserError: The data set does not exist, or is too large for the disk.
      OSError: Copying failed.
    """
    if is_remote(cache_dir):
        raise UserError(f"data.cache_dir is {cache_dir}; it must be a path on a disk.")
    manifest, source = read_manifest(path), epath.Path(path)
    with _locked(Path(cache_dir) / manifest.digest[:16]) as directory:
        files = _files(manifest, split)
        missing = [file for file in files if not _is_complete(directory, file)]
        _check_room(directory, path, sum(file.bytes for file in missing))
        _copy_all(source, directory, missing)
        replace_text(epath.Path(directory / MANIFEST), (source / MANIFEST).read_text())
    return str(directory)


def _files(manifest: Manifest, split: SplitName) -> list[_File]:
    """Returns the files of a split."""
    shards = manifest.splits[split].shards if split in manifest.splits else ()
    lengths = [shard.lengths for shard in shards]
    return [
        *(_File(each.file, each.bytes, each.hash, hash_file) for each in shards),
        *(_File(each.file, each.bytes, each.hash, hash_lengths) for each in lengths),
    ]


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[Path]:
    """Yields a directory with the lock held."""
    lock = lock_directory(directory)
    try:
        yield directory
    finally:
        os.close(lock)


def _is_complete(directory: Path, file: _File) -> bool:
    path = directory / file.name
    return path.exists() and path.stat().st_size == file.bytes


def _check_room(directory: Path, path: str, num_bytes: int) -> None:
    free = shutil.disk_usage(directory).free
    if num_bytes > free:
        raise UserError(
            f"data.cache_dir is {str(directory.parent)!r}, with {free / 1e9:.1f} GB of free "
            f"space, but the shards in {path!r} take {num_bytes / 1e9:.1f} GB; name another "
            f"directory, or leave data.cache_dir out to read the shards directly."
        )


def _copy_all(source: epath.Path, directory: Path, files: list[_File]) -> None:
    total = sum(file.bytes for file in files)
    is_shown = bool(files) and jax.process_index() == 0
    if is_shown:
        print(f"copying {total / 1e6:.1f} MB of shards to {directory}", flush=True)
    bar = progress_bar("copying", total, in_bytes=True, in_log=True, is_shown=is_shown)
    with futures.ThreadPoolExecutor(COPIES_AT_A_TIME) as pool, bar as advance:
        for num_bytes in pool.map(functools.partial(_copy, source, directory), files):
            advance(num_bytes)


def _copy(source: epath.Path, directory: Path, file: _File) -> int:
    """Returns the file size in bytes; OSError if the file differs from the manifest."""
    path, unfinished = source / file.name, directory / f"{file.name}.unfinished"
    try:
        path.copy(unfinished, overwrite=True)
        size = unfinished.stat().st_size
        if size != file.bytes:
            raise OSError(
                f"shard file {str(path)!r} has {size} bytes, not {file.bytes} as in the "
                f"manifest; upload it again."
            )
        if file.hash_file(unfinished) != file.hash:
            raise OSError(
                f"shard file {str(path)!r} has other content than in the manifest, or was "
                f"damaged while copying to {str(directory)!r}; try again, or upload it again."
            )
        unfinished.rename(directory / file.name)
    finally:
        unfinished.unlink(missing_ok=True)
    return size
