"""The lock of a run directory: only one run at a time writes there.

On a disk the kernel holds the lock and releases the lock when the process dies. In a bucket the
lock is a lease: an object that the holder renews. Without renewal the lease expires.
"""

import contextlib
import dataclasses
import datetime
import errno
import fcntl
import importlib
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from etils import epath

from stackjax.files.json_file import decode, parse_object
from stackjax.files.storage import is_remote
from stackjax.runtime.agreement import from_process_0
from stackjax.runtime.cluster import this_host
from stackjax.runtime.errors import UserError

LOCK = "run.lock"
LEASE_SECONDS = 120.0
"""Time until a lease expires without renewal."""
_RENEWALS = 6
"""Renewals within `LEASE_SECONDS`."""


@dataclasses.dataclass(frozen=True)
class Holder:
    """The process that holds a lock."""

    host: str
    pid: int
    since: str
    """Date and time, in UTC."""

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}"


@contextlib.contextmanager
def run_lock(workdir: epath.Path) -> Iterator[None]:
    """Creates a run directory if necessary, and holds the lock during the block.

    Process 0 holds the lock for all processes of the run. If the directory was created here and
    is still empty after the block, it is removed.

    Raises:
      UserError: Another run holds the lock; the message names host, process and time.
    """
    lock = _lease(workdir) if is_remote(workdir) else _file_lock(Path(workdir))
    with contextlib.ExitStack() as stack:
        from_process_0(lambda: stack.enter_context(lock))
        yield


def _this_process() -> Holder:
    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    return Holder(this_host(), os.getpid(), now)


def _holder(text: bytes) -> Holder | None:
    """Returns the holder from a lock file; None if the file is unreadable."""
    try:
        return decode(Holder, parse_object(text))
    except UserError:
        return None


def _in_use(workdir: os.PathLike, holder: Holder | None) -> UserError:
    return UserError(
        f"{os.fspath(workdir)} is in use by {holder or 'another process'}; wait until it has "
        f"ended, or start another run with --workdir."
    )


@contextlib.contextmanager
def _file_lock(workdir: Path) -> Iterator[None]:
    made = [path for path in (workdir, *workdir.parents) if not path.exists()]
    workdir.mkdir(parents=True, exist_ok=True)
    path = workdir / LOCK
    file = _locked_file(path)
    try:
        file.truncate(0)
        file.write(json.dumps(dataclasses.asdict(_this_process())).encode() + b"\n")
        file.flush()
        yield
    finally:
        path.unlink(missing_ok=True)
        file.close()
        with contextlib.suppress(OSError):  # Directories with files remain.
            for directory in made:
                directory.rmdir()


def _locked_file(path: Path) -> IO[bytes]:
    """Returns the open and locked file; UserError if another process holds the lock."""
    while True:
        file = path.open("a+b")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with file:
                file.seek(0)
                raise _in_use(path.parent, _holder(file.read())) from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
                raise
            print(
                f"note: {path.parent} is on a file system without locks, so a second run in "
                f"this directory would not be refused",
                file=sys.stderr,
            )
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        file.close()  # The previous holder has just removed the file.


@contextlib.contextmanager
def _lease(workdir: epath.Path) -> Iterator[None]:
    bucket, _, name = os.fspath(workdir / LOCK).removeprefix("gs://").partition("/")
    client = importlib.import_module("google.cloud.storage").Client()
    lease = _Lease(client.bucket(bucket).blob(name), os.fspath(workdir))
    lease.take()
    stop = threading.Event()
    renewing = threading.Thread(target=lease.keep, args=(stop,), daemon=True)
    renewing.start()
    try:
        yield
    finally:
        stop.set()
        renewing.join()
        lease.release()


class _Lease:
    """A bucket object with the name of the holder; each renewal changes the generation.

    Clocks are never compared between hosts: a lease has expired if the generation stays the
    same for `LEASE_SECONDS` on this process's clock.
    """

    def __init__(self, blob: Any, workdir: str):
        self._blob = blob
        self._workdir = workdir
        self._text = json.dumps(dataclasses.asdict(_this_process())) + "\n"
        self._generation = 0
        self._exceptions = importlib.import_module("google.cloud.exceptions")

    def take(self) -> None:
        """Takes the lease, after waiting until an abandoned lease has expired."""
        generation, holder = self._read()
        if generation and not _has_died(holder):
            self._wait_for_expiry(generation, holder)
        try:
            self._write(generation)
        except self._exceptions.PreconditionFailed:
            raise _in_use(epath.Path(self._workdir), self._read()[1]) from None

    def keep(self, stop: threading.Event) -> None:
        """Renews the lease until `stop` is set; exits if another process has the lease."""
        renewed = time.monotonic()
        while not stop.wait(LEASE_SECONDS / _RENEWALS):
            try:
                self._write(self._generation)
                renewed = time.monotonic()
            except self._exceptions.PreconditionFailed:
                self._abandon("another process has taken it over")
            except (self._exceptions.GoogleCloudError, OSError) as error:
                if time.monotonic() - renewed > LEASE_SECONDS:
                    self._abandon(f"its lease could not be renewed ({error})")

    def release(self) -> None:
        """Deletes the lease."""
        with contextlib.suppress(self._exceptions.GoogleCloudError):
            self._blob.delete(if_generation_match=self._generation)

    def _read(self) -> tuple[int, Holder | None]:
        """Returns the object's generation (0 without an object) and the holder."""
        try:
            text = self._blob.download_as_bytes()
        except self._exceptions.NotFound:
            return 0, None
        return self._blob.generation, _holder(text)

    def _write(self, generation: int) -> None:
        self._blob.upload_from_string(self._text, if_generation_match=generation)
        self._generation = self._blob.generation

    def _wait_for_expiry(self, generation: int, holder: Holder | None) -> None:
        print(
            f"{self._workdir} is leased by {holder or 'another process'}: waiting up to "
            f"{LEASE_SECONDS:.0f} s to see whether it is still running",
            flush=True,
        )
        deadline = time.monotonic() + LEASE_SECONDS
        while time.monotonic() < deadline:
            time.sleep(LEASE_SECONDS / _RENEWALS / 4)
            found, newest = self._read()
            if found == 0:
                return
            if found != generation:
                raise _in_use(epath.Path(self._workdir), newest)

    def _abandon(self, reason: str) -> None:
        """Ends the process at once, because another run may write to the directory now."""
        print(f"error: {self._workdir}: {reason}; this run stops.", file=sys.stderr, flush=True)
        os._exit(2)


def _has_died(holder: Holder | None) -> bool:
    """Returns whether a holder was a process on this host and has ended."""
    if holder is None or holder.host != this_host():
        return False
    try:
        os.kill(holder.pid, 0)
    except (ProcessLookupError, OverflowError):
        return True
    except PermissionError:
        return False
    return holder.pid == os.getpid()
