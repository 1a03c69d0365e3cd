"""Staging directories: output is complete or absent after any failure."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from stackjax.data.manifest import read_manifest
from stackjax.data.sources import TokenSource
from stackjax.files.staging import staging_directory

COMMAND = [sys.executable, "-m", "stackjax.prepare"]


def write_jsonl(path: Path, copies: int) -> str:
    """Writes `copies` times 200 different documents with 12 kB each."""
    texts = (f"{index} {'déjà vu ' * 1200}" for index in range(200))
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts) * copies)
    return str(path)


def test_success_renames_the_staging_directory(tmp_path):
    with staging_directory(tmp_path / "out") as staging:
        (staging / "a").write_text("a")
        assert not (tmp_path / "out").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "a").read_text() == "a"


def test_failure_leaves_no_output(tmp_path):
    with pytest.raises(OSError, match="full"), staging_directory(tmp_path / "out") as staging:
        (staging / "a").write_text("a")
        raise OSError("full")
    assert list(tmp_path.iterdir()) == []


def test_leftovers_of_a_killed_run_are_removed(tmp_path):
    left = tmp_path / ".out.unfinished"
    (left / "scratch" / "deep").mkdir(parents=True)
    (left / "part00000.train").write_text("left")
    with staging_directory(tmp_path / "out") as staging:
        assert staging == left
        assert list(staging.iterdir()) == []
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_existing_output_is_refused_and_kept(tmp_path, kind):
    output = tmp_path / "out"
    kept = output if kind == "file" else output / "kept"
    kept.parent.mkdir(exist_ok=True)
    kept.write_text("kept")
    with pytest.raises(FileExistsError, match="exists already"), staging_directory(output):
        pytest.fail("existing output was not refused")
    assert kept.read_text() == "kept"
    assert list(tmp_path.iterdir()) == [output]


def test_empty_directory_may_become_the_output(tmp_path):
    (tmp_path / "out").mkdir()
    with staging_directory(tmp_path / "out") as staging:
        (staging / "a").write_text("a")
    assert (tmp_path / "out" / "a").exists()


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> str:
    """Returns a file that keeps two processes busy for a while."""
    return write_jsonl(tmp_path_factory.mktemp("large") / "a.jsonl", copies=10)


def start(large: str, output: Path) -> subprocess.Popen:
    """Starts the command on two processes; returns once both are writing shards."""
    # Background jobs of a shell and child processes ignore Ctrl-C.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(
        [*COMMAND, large, output, "--tokenizer", "bytes", "--num-processes", "2"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    signal.signal(signal.SIGINT, handler)
    wait_for(lambda: len(list(output.parent.glob(".*/parts/part*.train"))) >= 2)
    return process


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def group_is_gone(process: subprocess.Popen) -> bool:
    try:
        os.killpg(process.pid, 0)
    except ProcessLookupError:
        return True
    return False


def test_killed_command_completes_when_run_again(large, tmp_path):
    output = tmp_path / "out"
    process = start(large, output)
    process.kill()
    process.communicate()
    wait_for(lambda: group_is_gone(process))
    assert not output.exists()
    left = [path.name for path in tmp_path.iterdir()]
    assert len(left) == 1 and left[0].startswith(".out")
    subprocess.run([*COMMAND, large, output, "--tokenizer", "bytes"], check=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    manifest = read_manifest(str(output))
    documents = sum(split.documents for split in manifest.splits.values())
    assert documents == 2000
    assert len(TokenSource(str(output), "train", 2048)) > 1000


def worker_ids(process: subprocess.Popen) -> list[int]:
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    found = []
    for child in map(int, children.split()):
        with open(f"/proc/{child}/cmdline") as file:
            if "spawn_main" in file.read():
                found.append(child)
    return found


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="reads /proc")
def test_killed_worker_ends_the_command_with_a_message(large, tmp_path):
    process = start(large, tmp_path / "out")
    os.kill(worker_ids(process)[0], signal.SIGKILL)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 2
    assert error.startswith("error: a worker process was killed")
    assert error.count("\n") == 1
    wait_for(lambda: group_is_gone(process))
    assert_no_output(tmp_path)


def assert_no_output(directory: Path) -> None:
    """Checks that a directory is empty, except for finished parts."""
    for path in directory.iterdir():
        assert path.name == ".out.unfinished" and list(path.glob("parts/*.json"))


def test_interrupted_command_leaves_no_output(large, tmp_path):
    process = start(large, tmp_path / "out")
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert error == "error: interrupted.\n"
    assert process.returncode == 130
    wait_for(lambda: group_is_gone(process))
    assert_no_output(tmp_path)


def test_full_disk_is_one_line_and_leaves_no_output(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", copies=1)
    limit_200_kib = ["bash", "-c", 'ulimit -f 200; exec "$@"', "bash"]
    done = subprocess.run(
        [*limit_200_kib, *COMMAND, path, tmp_path / "out", "--tokenizer", "bytes"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: cannot write")
    assert done.stderr.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == [Path(path)]


def test_two_simultaneous_commands_write_one_data_set(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", copies=1)
    arguments = [*COMMAND, path, tmp_path / "out", "--tokenizer", "bytes"]
    both = [subprocess.Popen(arguments, stderr=subprocess.PIPE) for _ in range(2)]
    errors = [process.communicate(timeout=60)[1] for process in both]
    assert sorted(process.returncode for process in both) == [0, 2]
    assert any(b"exists already" in error for error in errors)
    assert read_manifest(str(tmp_path / "out")).splits["train"].documents > 100
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl", "out"]
