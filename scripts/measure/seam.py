"""Cost of growth and of checkpoints."""

import contextlib
import dataclasses
import functools
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding

from scripts.measure.machine import check_memory
from scripts.measure.result import (
    CannotMeasure,
    Number,
    Peaks,
    median,
    peaks_since,
    read_peaks,
    seconds_of,
)
from stackjax.checkpoint.directory import absolute
from stackjax.checkpoint.restore import load_whole
from stackjax.checkpoint.save import Checkpoints
from stackjax.config import Config
from stackjax.sharding.mesh import build_mesh
from stackjax.sharding.partition import partition_of
from stackjax.training.compile import abstract_state, new_state, phase_optimizer
from stackjax.training.phase import Phase
from stackjax.training.preflight import bytes_per_device
from stackjax.training.train_state import TrainState, enter_phase

Grown = Literal["parameters", "reset", "grow", "keep"]
"""`parameters`, or the whole state with this `optimizer_state`."""

REPEATS = 7
SAVES = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Seam:
    """The jitted growth, compared with a copy of the result."""

    compile_seconds: float
    first_seconds: float
    """First call, the only call in a run. Memory comes fresh from the system."""
    median_seconds: float
    """Median after the first call."""
    copy_seconds: float
    """Median time to copy the result on the same devices."""
    copies: float
    """`median_seconds` over `copy_seconds`."""
    grown_bytes: int
    """Result size over all devices."""
    program_bytes: int
    """Source, temporaries and result (unless in place), on each
    device."""
    device_peak_bytes: Number
    host_peak_bytes: Number


@dataclasses.dataclass(frozen=True, kw_only=True)
class Saves:
    """Saving and restoring checkpoints."""

    stall_seconds: float
    """Median delay of the next step by a save."""
    longest_stall_seconds: float
    on_disk_seconds: float
    """Median time until a checkpoint is complete on disk."""
    restore_seconds: float
    """From opening the directory to the state on the devices; the files may still be in the
    host's memory."""
    state_bytes: int
    """Parameters and optimizer state, over all devices."""
    device_peak_bytes: Number
    host_peak_bytes: Number


def cases(target: Phase) -> tuple[Grown, ...]:
    """Returns the cases: parameters, the run's `optimizer_state`, and grown moments."""
    return tuple(dict.fromkeys(("parameters", target.optimizer_state, "grow")))


def measure_seam(config: Config, source: Phase, target: Phase, grown: Grown) -> Seam:
    """Returns the growth time from the previous phase.

    Raises:
      CannotMeasure: The model does not grow, or memory does not suffice.
    """
    if target.growth is None:
        raise CannotMeasure("no operator grows the model of this phase")
    before = read_peaks()
    tx = phase_optimizer(target)
    if grown == "parameters":
        tx, grown = optax.identity(), "reset"
    target = dataclasses.replace(target, optimizer_state=grown)
    enter = functools.partial(enter_phase, source, target, tx)
    source_mesh, mesh = build_mesh(source.mesh), build_mesh(target.mesh)

    def start() -> TrainState:
        with jax.set_mesh(source_mesh):
            state = _parted(new_state(config, source), grown)
        return jax.device_put(state, jax.tree.map(lambda leaf: _on(leaf, mesh), state))

    with jax.set_mesh(mesh):
        whole = abstract_state(source)
        state = _parted(whole, grown)
        result = jax.eval_shape(enter, state, jax.random.key(0))
        check_memory("growing", max(_on_each(whole, mesh), 2 * _on_each((state, result), mesh)))
        return _time_seam(enter, start, before)


def _parted(state: TrainState, grown: Grown) -> TrainState:
    """Returns the state for growth, without moments if they are reset."""
    return dataclasses.replace(state, opt_state=None) if grown == "reset" else state


def _time_seam(
    enter: Callable[[TrainState, jax.Array], TrainState],
    start: Callable[[], TrainState],
    before: Peaks,
) -> Seam:
    """Returns the times for a growth with donated source, as in a run.

    Args:
      start: Makes a source.
    """
    source, key = jax.block_until_ready(start()), jax.random.key(0)
    since = time.perf_counter()
    with warnings.catch_warnings():
        # Only equal shapes are reused in place.
        warnings.filterwarnings("ignore", "Some donated buffers were not usable")
        compiled = jax.jit(enter, donate_argnums=0).lower(source, key).compile()
    compile_seconds = time.perf_counter() - since
    first_seconds, grown = seconds_of(lambda: compiled(source, key))
    peaks, grown_bytes = peaks_since(before), _num_bytes(grown)
    del source, grown
    source, copy = start(), jax.jit(lambda tree: jax.tree.map(jnp.copy, tree))
    growing, copying = [], []
    for _ in range(REPEATS):
        donated = jax.block_until_ready(copy(source))
        seconds, grown = seconds_of(lambda donated=donated: compiled(donated, key))
        growing.append(seconds)
        copying.append(seconds_of(lambda grown=grown: copy(grown))[0])
        del donated, grown  # before the next ones are made
    memory: Any = compiled.memory_analysis()
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return Seam(
        compile_seconds=compile_seconds,
        first_seconds=first_seconds,
        median_seconds=median(growing),
        copy_seconds=median(copying),
        copies=median(growing) / median(copying),
        grown_bytes=grown_bytes,
        program_bytes=memory.argument_size_in_bytes + memory.temp_size_in_bytes + results,
        **peaks,
    )


def measure_saves(config: Config, phase: Phase, mesh: Mesh) -> Saves:
    """Returns checkpoint times for a phase's state, next to the run directory.

    Raises:
      CannotMeasure: Memory or disk do not suffice.
    """
    before, abstract = read_peaks(), abstract_state(phase)
    check_memory("a state with its copy", 2 * _on_each(abstract, mesh))
    with _directory(config) as workdir:
        _check_disk(workdir, (config.checkpoints.keep_last + 1) * _num_bytes(abstract))
        state = jax.block_until_ready(new_state(config, phase))
        stalls, on_disk = [], []
        with Checkpoints(workdir, phase, config.checkpoints) as checkpoints:
            for step in range(1, SAVES + 1):
                start = time.perf_counter()
                checkpoints.save(step, state, phase.start)
                stalls.append(time.perf_counter() - start)
                checkpoints.wait()
                on_disk.append(time.perf_counter() - start)
        del state
        newest = workdir / phase.directory / str(SAVES)
        restore, _ = seconds_of(lambda: load_whole(newest, abstract, mesh)[0])
    return Saves(
        stall_seconds=median(stalls),
        longest_stall_seconds=max(stalls),
        on_disk_seconds=median(on_disk),
        restore_seconds=restore,
        state_bytes=_num_bytes(abstract),
        **peaks_since(before),
    )


@contextlib.contextmanager
def _directory(config: Config) -> Iterator[epath.Path]:
    """Yields a temporary directory on the run's file system."""
    workdir = absolute(config.workdir)
    directory = workdir.with_name(f"{workdir.name}.benchmark")
    _remove(directory)  # left by a killed benchmark
    directory.mkdir(parents=True, exist_ok=True)
    try:
        yield directory
    finally:
        _remove(directory)


def _remove(directory: epath.Path) -> None:
    if jax.process_index() == 0 and directory.exists():
        directory.rmtree()
    multihost_utils.sync_global_devices(f"{directory} is gone")


def _check_disk(directory: epath.Path, needed: int) -> None:
    if "://" in str(directory):  # a bucket is never full
        return
    free = shutil.disk_usage(directory).free
    if needed > free:
        raise CannotMeasure(
            f"checkpoints take {needed / 2**30:.1f} GiB, and {directory} has "
            f"{free / 2**30:.1f} GiB free"
        )


def _on(leaf: jax.Array, mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, partition_of(leaf))


def _on_each(tree: Any, mesh: Mesh) -> int:
    """Returns a tree's bytes per device."""
    return bytes_per_device(tree, mesh.abstract_mesh)


def _num_bytes(tree: Any) -> int:
    return sum(leaf.size * jnp.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree))
