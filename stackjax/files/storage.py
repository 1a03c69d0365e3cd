"""Disk paths and bucket paths, such as `gs://bucket/...`."""

import contextlib
import errno
import importlib
import os
import socket
import urllib.parse
import urllib.request
import uuid
from collections.abc import Iterator

from etils import epath
from fsspec import config as fsspec_config

from stackjax.runtime.errors import UserError

_STORAGE_URL = ("STORAGE_EMULATOR_HOST", "https://storage.googleapis.com")
"""Environment variable for another storage server, and the default URL."""
_NETWORK_SECONDS = 5.0
_PACKAGES = {"gs": "gcsfs", "s3": "s3fs", "az": "adlfs", "hf": "huggingface_hub"}

# Do not cache bucket listings: other hosts write too.
for _protocol in ("gcs", "s3"):
    fsspec_config.conf.setdefault(_protocol, {}).setdefault("use_listings_cache", False)


def is_remote(path: epath.PathLike) -> bool:
    """Returns whether a path is in a bucket. In buckets every file write is atomic."""
    return "://" in os.fspath(path)


def check_bucket(path: epath.PathLike, *, for_checkpoints: bool = False) -> None:
    """Raises an error if a path is in an unusable bucket; does nothing for disk paths.

    Args:
      for_checkpoints: Whether Orbax will use the bucket. Orbax reads the bucket's metadata.

    Raises:
      UserError: The package for the bucket is not installed, or the scheme is unknown.
      OSError: The bucket does not exist, or this account has no access.
    """
    if not is_remote(path):
        return
    scheme, _, rest = os.fspath(path).partition("://")
    if scheme not in _PACKAGES:
        known = ", ".join(f"{name}://" for name in _PACKAGES)
        raise UserError(f"{path} is not on a disk and in none of {known}; name another path.")
    bucket = epath.Path(f"{scheme}://{rest.partition('/')[0]}")
    if scheme == "gs":
        _check_network(bucket)
    try:
        exists = bucket.exists()
        if for_checkpoints:
            client = importlib.import_module("google.cloud.storage").Client()
            client.get_bucket(bucket.name)
    except ImportError as error:
        raise UserError(f"{path} needs `pip install {_PACKAGES[scheme]}`.") from error
    except Exception as error:  # Each bucket package raises different errors.
        reason = " ".join(str(error).split())
        raise OSError(
            f"{bucket} cannot be used: {reason}; log in, or grant this account read access to "
            f"the bucket's metadata and list, read and write access to its objects."
        ) from error
    if not exists:
        raise FileNotFoundError(
            f"bucket {bucket} does not exist, or this account has no access; create it, or "
            f"name another bucket."
        )


def _check_network(bucket: epath.Path) -> None:
    """Raises OSError if Google's storage is unreachable; its client would retry for minutes."""
    if urllib.request.getproxies():
        return  # Only the proxy can tell.
    url = urllib.parse.urlsplit(os.environ.get(*_STORAGE_URL))
    port = url.port or {"http": 80}.get(url.scheme, 443)
    try:
        socket.create_connection((url.hostname, port), _NETWORK_SECONDS).close()
    except OSError as error:
        raise OSError(
            f"{bucket} cannot be used: {url.hostname} is unreachable ({error}); fix the "
            f"network, or name a path on a disk."
        ) from error


def replace_text(path: epath.Path, text: str) -> None:
    """Replaces a small file atomically: readers see the old text or the new text.

    The new text is synced to disk before this returns.
    """
    if is_remote(path):
        path.write_text(text)
        return
    with replacement(path) as temporary, temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    sync_directory(path.parent)


@contextlib.contextmanager
def replacement(path: epath.Path) -> Iterator[epath.Path]:
    """Yields a temporary file next to a file on a disk, which it replaces after the block.

    After a failed block the file is as before.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def sync_file(path: epath.PathLike) -> None:
    """Syncs the contents of a file to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_directory(directory: epath.PathLike) -> None:
    """Syncs a directory's entries to disk, if the file system supports it."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems cannot sync directories.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)
