"""Token shards copied to a local disk, once for all processes on a host."""

import contextlib
import functools
import os
import shutil
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path

import jax
from etils import epath

from stackjax.data.manifest import MANIFEST, Shard, SplitName, read_manifest
from stackjax.data.shard_hash import hash_file
from stackjax.files.staging import lock_directory
from stackjax.files.storage import is_remote, replace_text
from stackjax.runtime.errors import UserError
from stackjax.runtime.progress_bar import progress_bar

COPIES_AT_A_TIME = 8


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
        shards = manifest.splits[split].shards if split in manifest.splits else ()
        missing = [shard for shard in shards if not _is_complete(directory, shard)]
        _check_room(directory, path, sum(shard.bytes for shard in missing))
        _copy_all(source, directory, missing)
        replace_text(epath.Path(directory / MANIFEST), (source / MANIFEST).read_text())
    return str(directory)


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[Path]:
    """Yields a directory with the lock held."""
    lock = lock_directory(directory)
    try:
        yield directory
    finally:
        os.close(lock)


def _is_complete(directory: Path, shard: Shard) -> bool:
    file = directory / shard.file
    return file.exists() and file.stat().st_size == shard.bytes


def _check_room(directory: Path, path: str, num_bytes: int) -> None:
    free = shutil.disk_usage(directory).free
    if num_bytes > free:
        raise UserError(
            f"data.cache_dir is {str(directory.parent)!r}, with {free / 1e9:.1f} GB of free "
            f"space, but the shards in {path!r} take {num_bytes / 1e9:.1f} GB; name another "
            f"directory, or leave data.cache_dir out to read the shards directly."
        )


def _copy_all(source: epath.Path, directory: Path, shards: list[Shard]) -> None:
    total = sum(shard.bytes for shard in shards)
    is_shown = bool(shards) and jax.process_index() == 0
    if is_shown:
        print(f"copying {total / 1e6:.1f} MB of shards to {directory}", flush=True)
    bar = progress_bar("copying", total, in_bytes=True, in_log=True, is_shown=is_shown)
    with futures.ThreadPoolExecutor(COPIES_AT_A_TIME) as pool, bar as advance:
        for num_bytes in pool.map(functools.partial(_copy, source, directory), shards):
            advance(num_bytes)


def _copy(source: epath.Path, directory: Path, shard: Shard) -> int:
    """Returns the file size in bytes; OSError if the file differs from the manifest."""
    file, unfinished = source / shard.file, directory / f"{shard.file}.unfinished"
    try:
        file.copy(unfinished, overwrite=True)
        size = unfinished.stat().st_size
        if size != shard.bytes:
            raise OSError(
                f"shard {str(file)!r} has {size} bytes, not {shard.bytes} as in the manifest; "
                f"upload it again."
            )
        if hash_file(unfinished) != shard.hash:
            raise OSError(
                f"shard {str(file)!r} has other tokens than in the manifest, or was damaged "
                f"while copying to {str(directory)!r}; try again, or upload it again."
            )
        unfinished.rename(directory / shard.file)
    finally:
        unfinished.unlink(missing_ok=True)
    return size
