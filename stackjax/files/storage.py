"""Paths that may lie in a bucket, `gs://bucket/...`, beside those on a disk."""

import errno
import importlib
import os
import socket
import urllib.parse
import urllib.request
import uuid

from etils import epath
from fsspec import config as fsspec_config

from stackjax.runtime.errors import UserError

_STORAGE_URL = ("STORAGE_EMULATOR_HOST", "https://storage.googleapis.com")
"""The variable of the environment that names a server in place of Google's, and Google's."""
_NETWORK_SECONDS = 5.0
_PACKAGES = {"gs": "gcsfs", "s3": "s3fs", "az": "adlfs", "hf": "huggingface_hub"}

# Other hosts write too: what a directory of a bucket holds is asked anew each time.
for _protocol in ("gcs", "s3"):
    fsspec_config.conf.setdefault(_protocol, {}).setdefault("use_listings_cache", False)


def is_remote(path: epath.PathLike) -> bool:
    """Returns whether a path lies in a bucket, where a file appears whole or not at all."""
    return "://" in os.fspath(path)


def check_bucket(path: epath.PathLike, *, for_checkpoints: bool = False) -> None:
    """Raises where a path lies in a bucket that cannot be used; does nothing for a disk.

    Args:
      for_checkpoints: Whether Orbax is to use it, which asks for the bucket's metadata.

    Raises:
      UserError: A package is not installed, or no package is known.
      OSError: There is no such bucket, or no permission.
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
    except Exception as error:  # Every package of a kind of bucket has errors of its own.
        reason = " ".join(str(error).split())
        raise OSError(
            f"{bucket} cannot be used: {reason}; log in, or see to it that this account may "
            f"read the bucket's metadata and list, read and write its objects."
        ) from error
    if not exists:
        raise FileNotFoundError(
            f"there is no bucket {bucket}, or this account may not see it; create it, or name "
            f"another."
        )


def _check_network(bucket: epath.Path) -> None:
    """Raises OSError if Google's storage cannot be reached; its clients try for minutes."""
    if urllib.request.getproxies():
        return  # Only the proxy knows.
    url = urllib.parse.urlsplit(os.environ.get(*_STORAGE_URL))
    port = url.port or {"http": 80}.get(url.scheme, 443)
    try:
        socket.create_connection((url.hostname, port), _NETWORK_SECONDS).close()
    except OSError as error:
        raise OSError(
            f"{bucket} cannot be used: {url.hostname} cannot be reached ({error}); mend the "
            f"network, or name a path on a disk."
        ) from error


def replace_text(path: epath.Path, text: str) -> None:
    """Replaces a small file as a whole: readers see the old text or the new.

    When this returns, the new text outlives a crash of the machine.
    """
    if is_remote(path):
        path.write_text(text)
        return
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def sync_directory(directory: epath.PathLike) -> None:
    """Brings the names in a directory to disk, as far as the file system can."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems sync files alone.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)
