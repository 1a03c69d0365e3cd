"""Prepares a data set in processes that kill themselves; run by `test_resumed_prepare.py`.

    python kill_prepare.py DIRECTORY EVERY

A kill happens just before the n-th change of a file name or opening of a file for writing, for
every n divisible by EVERY. Prints a JSON object per kill.
"""

import itertools
import json
import os
import shutil
import signal
import sys
from pathlib import Path

from stackjax.data import parts, piece
from stackjax.data.config import PrepareConfig
from stackjax.data.prepare import prepare

CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree"}


def run(output: Path, kill_at: int) -> int:
    """Runs `prepare` in a forked process; returns the wait status."""
    child = os.fork()
    if child == 0:
        kill_at_event(kill_at)
        try:
            prepare(config(output))
        finally:
            os._exit(1 if sys.exception() else 0)
    return os.waitpid(child, 0)[1]


def config(output: Path) -> PrepareConfig:
    """Returns the options of every run."""
    return PrepareConfig(
        paths=(str(output.parent / "a.jsonl"), str(output)),
        tokenizer="bytes",
        validation_fraction=0.3,
        num_processes=1,
    )


def kill_at_event(number: int) -> None:
    """Kills this process before an event; 0 is never."""
    events = itertools.count(1)

    def hook(event: str, args: tuple) -> None:
        writes = event == "open" and isinstance(args[1], str) and "w" in args[1]
        if (writes or event in CHANGES) and next(events) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def finished(staging: Path) -> set[int]:
    """Returns the inodes of all shards with a record."""
    records = [json.loads(path.read_text()) for path in (staging / "parts").glob("*.json")]
    sizes = {split["shard"]["hash"] for part in records for split in part["splits"].values()}
    assert len(sizes) == sum(len(part["splits"]) for part in records)
    names = {split["shard"]["file"] for part in records for split in part["splits"].values()}
    moved = staging.glob("set/*.array_record")
    return {path.stat().st_ino for path in moved} | {
        (staging / "parts" / name).stat().st_ino
        for name in names
        if (staging / "parts" / name).exists()
    }


def contents(path: Path) -> dict[str, bytes]:
    """Returns the files of a directory."""
    return {file.name: file.read_bytes() for file in path.iterdir()}


def main(directory: Path, every: int) -> None:
    """Runs all kills."""
    piece.PIECE_BYTES, parts.PART_BYTES = 300, 1000
    output, staging = directory / "out", directory / ".out.unfinished"
    assert run(output, 0) == 0
    expected = contents(output)
    for number in itertools.count(every, every):
        shutil.rmtree(output, ignore_errors=True)
        status = run(output, number)
        if not os.WIFSIGNALED(status):
            break
        was_complete, kept = output.exists(), finished(staging)
        again = run(output, 0)
        inodes = {path.stat().st_ino for path in output.iterdir()}
        result = {
            "number": number,
            "was_complete": was_complete,
            "again": again,
            "kept": len(kept),
            "is_kept": kept <= inodes,
            "is_equal": contents(output) == expected,
            "left": [path.name for path in directory.iterdir() if path.name.startswith(".")],
        }
        print("result", json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
