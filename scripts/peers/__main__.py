"""Compares train-step times of stackjax and its peers on a CPU.

    scripts/peers.sh

makes the Python environments, and fills the tables in docs/performance.md. Each peer is a
separate process, in the Python given by --python or in this Python. Peers take turns, so other
load on the machine affects all of them equally.
"""

import contextlib
import dataclasses
import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import tyro

from scripts.measure.machine import cpu_model, num_cores
from scripts.page import replace_table
from scripts.peers.environment import ENVIRONMENTS, Environment
from scripts.peers.report import PACKAGES, Measured, contents, origin, table
from stackjax.files.output import check_writable
from stackjax.runtime.command_line import parse
from stackjax.runtime.constraints import Checked
from stackjax.runtime.errors import UserError, one_line_errors
from stackjax.runtime.numbers import Size, Text

PeerName = Literal["stackjax", "plain", "maxtext", "litgpt", "transformers"]
ROOT = Path(__file__).parents[2]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PeersConfig(Checked):
    """Compares train-step times of stackjax and its peers on a CPU."""

    shape: Literal["tiny", "small"]
    """Model and batch size."""
    peers: tuple[PeerName, ...] = get_args(PeerName)
    """Peers to run."""
    python: tuple[Text, ...] = ()
    """PEER=PATH for each peer with another Python."""
    environment: Environment = "none"
    """Variables set for all processes, from scripts/peers/environment.py."""
    rounds: Size = 20
    """Turns per peer."""
    steps: Size = 3
    """Timed steps per turn, after an untimed step."""
    output: Annotated[Path | None, tyro.conf.arg(metavar="FILE.json")] = None
    """File for all results."""
    page: Path | None = None
    """Page with a table for this shape and environment."""


class Worker:
    """A peer in a separate process, with an answer for each input line."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], log: Path):
        self._log = log
        with log.open("w") as stream:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stream,
                cwd=ROOT,
                env=environment,
                text=True,
            )

    def read(self) -> dict[str, Any]:
        """Returns the next answer; SystemExit with the end of the log if there is none."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            sys.exit(f"error: {self._process.args} ended:\n{self._log.read_text()[-4000:]}")
        return json.loads(line)

    def ask(self, num_steps: int) -> dict[str, Any]:
        """Returns the results for a turn."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended; read reports this
            print(num_steps, file=self._process.stdin, flush=True)
        return self.read()

    def close(self) -> None:
        """Ends the process."""
        self._process.communicate()


def main() -> None:
    """Runs the command line."""
    with one_line_errors():
        compare(parse(PeersConfig, prog="python -m scripts.peers"))


def compare(config: PeersConfig) -> None:
    """Runs, prints and writes a comparison."""
    for name, path in (("--output", config.output), ("--page", config.page)):
        if path is not None:
            check_writable(name, path)
    pythons = interpreters(config)
    tuning = ENVIRONMENTS[config.environment]
    settings = {
        "date": datetime.date.today().isoformat(),
        "cpu": cpu_model(),
        "num_cores": num_cores(),
        "versions": installed(pythons),
        "environment": tuning,
    }
    commands = {
        name: [python, "-m", "scripts.peers.worker", name, config.shape]
        for name, python in pythons.items()
    }
    print(f"{config.shape}, environment {tuning or 'none'}", flush=True)
    with tempfile.TemporaryDirectory() as directory:
        measured = measure(
            commands,
            clean_environment(directory) | tuning,
            Path(directory),
            rounds=config.rounds,
            steps=config.steps,
        )
    text = f"{table(measured, config.shape)}\n\n{origin(measured, settings)}"
    print(text)
    if config.page is not None:
        replace_table(config.page, f"peers {config.shape} {config.environment}", text)
    if config.output is not None:
        config.output.write_text(
            json.dumps(contents(measured, config.shape, settings), indent=1)
        )


def measure(
    commands: Mapping[str, Sequence[str]],
    environment: Mapping[str, str],
    logs: Path,
    *,
    rounds: int,
    steps: int,
) -> dict[str, Measured]:
    """Returns every peer's results; peers take turns.

    Args:
      environment: Environment variables for every process.
      logs: Directory for the processes' output.
      rounds: Turns per peer.
      steps: Timed steps per turn.
    """
    starts: dict[str, dict[str, Any]] = {}
    turns: dict[str, list[dict[str, Any]]] = {name: [] for name in commands}
    with contextlib.ExitStack() as stack:
        workers: dict[str, Worker] = {}
        for name, command in commands.items():
            # One after another, so no peer compiles while another is timed.
            begin = time.perf_counter()
            worker = Worker(command, environment, logs / f"{name}.log")
            workers[name] = stack.enter_context(contextlib.closing(worker))
            starts[name] = worker.read()
            starts[name]["first_step_seconds"] = time.perf_counter() - begin
            starts[name] |= worker.read()
            print(f"{name} is ready", flush=True)
        for _ in range(rounds):
            for name, worker in workers.items():
                turns[name].append(worker.ask(steps))
    return {
        name: Measured(
            seconds=[turn["seconds"] for turn in turns[name]],
            steps=steps,
            first_step_seconds=start["first_step_seconds"],
            peak_rss_mb=max(turn["peak_rss_mb"] for turn in turns[name]),
            num_params=start["num_params"],
            losses=[*start["losses"], *(turn["loss"] for turn in turns[name])],
        )
        for name, start in starts.items()
    }


def clean_environment(caches: str) -> dict[str, str]:
    """Returns this process's environment without variables in favor of a peer.

    Args:
      caches: An empty directory for compilation caches.
    """
    tuned = ("XLA_FLAGS", "GLIBC_TUNABLES", "LD_PRELOAD", "JAX_COMPILATION_CACHE_DIR")
    kept = {name: value for name, value in os.environ.items() if name not in tuned}
    return kept | {"JAX_PLATFORMS": "cpu", "TORCHINDUCTOR_CACHE_DIR": caches}


def interpreters(config: PeersConfig) -> dict[str, str]:
    """Returns each peer's Python; UserError for an unknown peer."""
    pythons: dict[str, str] = dict.fromkeys(config.peers, sys.executable)
    for pair in config.python:
        name, _, path = pair.partition("=")
        if name not in pythons or not path:
            raise UserError(f"--python {pair!r} is not PEER=PATH for one of {config.peers}.")
        pythons[name] = path
    return pythons


def installed(pythons: Mapping[str, str]) -> dict[str, str]:
    """Returns each package's version; an error if a package is missing or versions differ."""
    code = "import importlib.metadata as m, sys; print(*map(m.version, sys.argv[1:]))"
    versions: dict[str, set[str]] = {}
    for name, python in pythons.items():
        command = [python, "-c", code, *PACKAGES[name]]
        answer = subprocess.run(command, capture_output=True, text=True)
        if answer.returncode:
            sys.exit(f"error: {name} needs {PACKAGES[name]} in {python}:\n{answer.stderr}")
        for package, version in zip(PACKAGES[name], answer.stdout.split(), strict=True):
            versions.setdefault(package, set()).add(version)
    for package, found in versions.items():
        if len(found) > 1:
            raise UserError(f"all peers need one version of {package}; found {found}.")
    return {package: found.pop() for package, found in sorted(versions.items())}


if __name__ == "__main__":
    main()
