"""Run locks on disk and in buckets."""

import json
import os
import socket
import subprocess
import sys
import time

import pytest
from etils import epath
from fake_gcs import FakeGcs
from runs import ROOT

from stackjax.files import run_lock as module
from stackjax.files.run_lock import LOCK, run_lock
from stackjax.runtime.errors import UserError

HOLD = """
import sys, threading
from etils import epath
from stackjax.files import run_lock

run_lock.LEASE_SECONDS = 2.0
with run_lock.run_lock(epath.Path(sys.argv[1])):
    print("held", flush=True)
    threading.Event().wait(60)
"""


def hold(workdir) -> subprocess.Popen:
    """Returns a process that holds the lock on a run directory."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(workdir)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def refusal(workdir) -> str:
    with pytest.raises(UserError) as error, run_lock(workdir):
        pass
    return str(error.value)


def test_lock_names_its_holder_and_is_released_by_a_kill(tmp_path):
    workdir = epath.Path(tmp_path / "run")
    with hold(workdir) as process:
        message = refusal(workdir)
        assert (
            f"is in use by process {process.pid} on {socket.gethostname()}, since 20" in message
        )
        assert "another run with --workdir" in message
        process.kill()
    with run_lock(workdir):
        assert json.loads((workdir / LOCK).read_text())["pid"] == os.getpid()
        assert f"process {os.getpid()}" in refusal(workdir)
    assert not (workdir / LOCK).exists()


def test_released_lock_removes_empty_directories(tmp_path):
    with run_lock(epath.Path(tmp_path / "a" / "b")):
        assert (tmp_path / "a" / "b").is_dir()
    assert list(tmp_path.iterdir()) == []
    with run_lock(epath.Path(tmp_path / "a" / "b")):
        (tmp_path / "a" / "file").write_text("kept")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["file"]


def test_unreadable_lock_excludes_others(tmp_path):
    workdir = epath.Path(tmp_path)
    with run_lock(workdir):
        for text in (b"", b"{", b"\xff", b'{"host": "a", "pid": "b", "since": "c"}'):
            (workdir / LOCK).write_bytes(text)
            assert "is in use by another process;" in refusal(workdir)


@pytest.fixture
def gcs(monkeypatch):
    with FakeGcs("bucket") as server:
        monkeypatch.setattr(module, "LEASE_SECONDS", 2.0)
        yield server


RUN = epath.Path("gs://bucket/run")


def lease(gcs, **fields) -> dict:
    """Returns the lease holder in the bucket, with changed fields."""
    return json.loads(gcs.objects["bucket"][f"run/{LOCK}"].data) | fields


def test_renewed_lease_excludes_others_until_released(gcs):
    with run_lock(RUN):
        first = gcs.objects["bucket"][f"run/{LOCK}"].generation
        # The holder is on another host; leases of dead local processes do not count.
        gcs.put("bucket", "other/run.lock", b"")
        holder = lease(gcs, host="elsewhere")
        gcs.put("bucket", f"held/{LOCK}", json.dumps(holder).encode())
        held = epath.Path("gs://bucket/held")
        renewals = iter(range(100))

        def read(self):
            # Another process renews the lease between reads.
            return next(renewals) + 1, module.Holder(**holder)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module._Lease, "_read", read)
            assert "is in use by process" in refusal(held)
        time.sleep(0.7)
        assert gcs.objects["bucket"][f"run/{LOCK}"].generation > first
    assert f"run/{LOCK}" not in gcs.objects["bucket"]


def test_lease_without_renewal_expires(gcs, capsys):
    holder = {"host": "elsewhere", "pid": 7, "since": "2026-01-01 00:00:00 UTC"}
    gcs.put("bucket", f"run/{LOCK}", json.dumps(holder).encode())
    with run_lock(RUN):
        assert lease(gcs)["pid"] == os.getpid()
    assert "is leased by process 7 on elsewhere, since 2026-01-01" in capsys.readouterr().out


def test_lease_of_a_dead_local_process_is_taken_at_once(gcs, capsys):
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        pass
    holder = {"host": socket.gethostname(), "pid": process.pid, "since": "2026"}
    gcs.put("bucket", f"run/{LOCK}", json.dumps(holder).encode())
    with run_lock(RUN):
        assert lease(gcs)["pid"] == os.getpid()
    assert "is leased" not in capsys.readouterr().out


def test_one_of_two_simultaneous_takers_gets_the_lease(gcs, monkeypatch):
    upload = module._Lease._write

    def overtaken(self, generation):
        gcs.put("bucket", f"run/{LOCK}", b'{"host": "b", "pid": 8, "since": "now"}')
        monkeypatch.setattr(module._Lease, "_write", upload)
        upload(self, generation)

    monkeypatch.setattr(module._Lease, "_write", overtaken)
    assert "is in use by process 8 on b, since now" in refusal(RUN)


def test_process_with_a_lost_lease_exits(gcs):
    with hold("gs://bucket/run") as process:
        lock = gcs.objects["bucket"][f"run/{LOCK}"]
        gcs.put("bucket", f"run/{LOCK}", lock.data)
        assert process.wait(60) == 2
