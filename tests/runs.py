"""Complete runs, mostly `python -m stackjax.train` in a separate process.

`python runs.py SIGNAL POINT WHEN NTH ARG...` runs the same command and sends a signal to
itself `before` or `after` the nth call of the function POINT, given as `module:name`.
"""

import dataclasses
import fcntl
import functools
import importlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

from stackjax import train
from stackjax.config import Config
from stackjax.config_file import load_config
from stackjax.data.config import PrepareConfig
from stackjax.data.prepare import prepare

ROOT = Path(__file__).parent.parent
# A few small functions compile faster together than in one LLVM module each.
FAST_COMPILATION = "--xla_cpu_parallel_codegen_split_count=1"
if jax.__version_info__ < (0, 11):
    # Newer JAX has no such flag. Without it, XLA compiles a train step in three times the time.
    FAST_COMPILATION += " --xla_cpu_use_fusion_emitters=false"
WORDS = ("a", "model", "that", "grows", "while", "it", "trains", "and", "never", "forgets")
CLOCK = ("seconds", "tokens_per_second", "mfu")
TIMED = ("goodput", "late")
CONFIG = """
from stackjax.config import *
from stackjax.growth import Stack
from stackjax.model import ModelConfig
from stackjax.optimizers import AdamW


def get_config():
    return Config(
        model=ModelConfig(
            vocab_size=256,
            num_layers=2,
            embed_dim=16,
            mlp_dim=32,
            num_heads=4,
            num_kv_heads=2,
            head_dim=4,
        ),
        data=DataConfig(path="{data}", seq_len=16),
        optimizer=AdamW(peak_learning_rate=1e-2),
        stages=(
            Stage(tokens=8 * 128, batch_size=8),
            Stage(tokens=8 * 128, batch_size=8, growth=Stack(factor=2)),
        ),
        evaluation=EvaluationConfig(every_tokens=5 * 128, num_sequences=12, batch_size=8),
        checkpoints=CheckpointConfig(every_tokens=3 * 128, keep_last=9),
        # TensorBoard's writer imports PyTorch, at every start.
        logging=LoggingConfig(every_tokens=128, tensorboard=False),
        workdir="{runs}/unnamed",
    )
"""


@functools.cache
def config_with(path: Path, overrides: tuple[str, ...]) -> Config:
    return load_config("test", ["--config", str(path), *overrides])


MIXTURE = """
import dataclasses

import config
from stackjax.config import *


def get_config():
    run = config.get_config()
    names = {"web": 2.0, "code": 1.0, "prose": 1.0}
    sources = tuple(
        SourceConfig(name=name, path="{path}/" + name, weight=weight)
        for name, weight in names.items()
    )
    first, second = run.stages
    second = dataclasses.replace(
        second, seq_len=32, batch_size=8, source_weights=(1.0, 3.0, 0.0), rope_theta=5e4
    )
    return dataclasses.replace(
        run,
        data=DataConfig(sources=sources, seq_len=16),
        stages=(first, second),
        evaluation=dataclasses.replace(run.evaluation, num_sequences=8),
    )
"""


@dataclasses.dataclass(frozen=True)
class World:
    """Corpus, config and compilation cache, shared by all runs."""

    path: Path

    def args(self, workdir: Path, *overrides: str) -> list[str]:
        """The command line of a run."""
        config = str(self.path / "config.py")
        return ["--config", config, "--workdir", str(workdir), *overrides]

    def config(self, *overrides: str, workdir: Path | None = None) -> Config:
        """The config of a run, for calls in this process."""
        config = config_with(self.path / "config.py", overrides)
        return config if workdir is None else dataclasses.replace(config, workdir=str(workdir))

    def start(self, args: list[str], *signalled: str, **env: str) -> subprocess.Popen:
        """Starts a run. `signalled`: SIGNAL POINT WHEN NTH."""
        script = [str(Path(__file__)), *signalled] if signalled else ["-m", "stackjax.train"]
        return subprocess.Popen(
            [sys.executable, *script, *args],
            cwd=self.path,
            env=os.environ
            | {
                "JAX_PLATFORMS": "cpu",
                "JAX_NUM_CPU_DEVICES": "1",
                "JAX_COMPILATION_CACHE_DIR": str(self.path / "compilation_cache"),
                "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
                "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
                "XLA_FLAGS": FAST_COMPILATION,
                "PYTHONPATH": str(ROOT),
            }
            | env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, args: list[str], *signalled: str) -> tuple[int, str, str]:
        """Runs to the end; returns exit code, stdout and stderr."""
        with self.start(args, *signalled) as process:
            stdout, stderr = process.communicate()
        return process.returncode, stdout, stderr


def make_once(path: Path, make: Callable[[], None]) -> None:
    """Calls a function in the first process that asks; the others wait for its end."""
    with open(f"{path}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        made = Path(f"{path}.made")
        if not made.exists():
            make()
            made.touch()


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> World:
    """All test processes share it."""
    base = tmp_path_factory.getbasetemp()
    path = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "world"
    make_once(path, lambda: make_world(path))
    return World(path)


def make_world(path: Path) -> None:
    path.mkdir()
    data, text = str(path / "data"), path / "text.jsonl"
    # Synthetic text: the validation split must not change with the code.
    rng = random.Random(0)
    documents = [" ".join(rng.choices(WORDS, k=200)) for _ in range(100)]
    text.write_text("".join(json.dumps({"text": d}) + "\n" for d in documents))
    prepare(PrepareConfig(paths=(str(text), data), tokenizer="bytes", validation_fraction=0.2))
    (path / "config.py").write_text(CONFIG.format(data=data, runs=path))


@pytest.fixture(scope="session")
def mixture(world) -> Path:
    """A config file of a run on three sources, in two stages with other weights and lengths."""
    path = world.path / "mixture.py"

    def make():
        for seed, name in enumerate(("web", "code", "prose")):
            rng = random.Random(seed)
            words = rng.sample(WORDS, 6)
            lines = [
                json.dumps({"text": " ".join(rng.choices(words, k=80))}) for _ in range(60)
            ]
            text = world.path / f"{name}.jsonl"
            text.write_text("\n".join(lines))
            paths = (str(text), str(world.path / name))
            prepare(PrepareConfig(paths=paths, tokenizer="bytes", validation_fraction=0.2))
        path.write_text(MIXTURE.replace("{path}", str(world.path)))

    make_once(path, make)
    return path


@pytest.fixture(scope="session")
def uncut(world) -> Path:
    """The directory of an uninterrupted run, on one device."""

    def run():
        code, _, stderr = world.run(world.args(Path("uncut")))  # relative
        assert (code, stderr) == (0, ""), stderr

    make_once(world.path / "uncut", run)
    return world.path / "uncut"


def rarely_saved(config: Config) -> Config:
    """The run with checkpoints only where stages start and end."""
    checkpoints = dataclasses.replace(config.checkpoints, every_tokens=10**9)
    return dataclasses.replace(config, checkpoints=checkpoints)


def rows(workdir: Path) -> list[dict]:
    """A run's rows, without what depends on the clock: times, and rows of kinds in `TIMED`."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [
        {name: value for name, value in row.items() if name not in CLOCK}
        for row in map(json.loads, lines)
        if row["kind"] not in TIMED
    ]


def places(workdir: Path) -> list[tuple]:
    """Each row's coordinates."""
    names = ("kind", "phase", "stage", "step", "tokens", "examples", "flops")
    return [tuple(row[name] for name in names) for row in rows(workdir)]


def losses(workdir: Path) -> list[float]:
    """Every loss in a run's rows."""
    return [value for row in rows(workdir) for name, value in row.items() if "loss" in name]


def last_state(workdir: Path, stage: int, step: int = 8, phase: str = "train"):
    """Everything in a checkpoint, as NumPy arrays."""
    path = workdir / f"stage_{stage}" / phase / str(step)
    abstract = ocp.metadata(path).metadata
    whole = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), abstract)
    return ocp.load(path, whole)


def cut(uncut: Path, workdir: Path, step: int) -> None:
    """Makes a run directory with a single checkpoint: stage 0 at a step."""
    kept = uncut / "stage_0" / "train" / str(step)
    shutil.copytree(kept, workdir / "stage_0" / "train" / str(step))
    for name in ("config.json", "metrics.jsonl"):
        shutil.copy(uncut / name, workdir / name)


def assert_same_run(workdir: Path, expected: Path) -> None:
    """Parameters, optimizer state and rows agree, bit for bit."""
    assert rows(workdir) == rows(expected)
    for stage in (0, 1):
        found, wanted = last_state(workdir, stage), last_state(expected, stage)
        assert jax.tree.structure(found) == jax.tree.structure(wanted)
        jax.tree.map(np.testing.assert_array_equal, found, wanted)


def _main(number: str, point: str, when: str, nth: str, *args: str) -> None:
    # Under nohup SIGHUP is ignored, also in child processes.
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    module, name = point.split(":")
    owner = functools.reduce(getattr, name.split(".")[:-1], importlib.import_module(module))
    name = name.split(".")[-1]
    function, calls = getattr(owner, name), 0

    def call(*args, **kwargs):
        nonlocal calls
        calls += 1
        if when == "before" and calls == int(nth):
            os.kill(os.getpid(), getattr(signal, number))
        result = function(*args, **kwargs)
        if when == "after" and calls == int(nth):
            os.kill(os.getpid(), getattr(signal, number))
        return result

    setattr(owner, name, call)
    sys.argv[1:] = args
    train.main(owns_process=True)


if __name__ == "__main__":
    _main(*sys.argv[1:])
