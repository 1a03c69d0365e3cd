"""Cost of the loader and of the host's work between steps."""

import contextlib
import dataclasses
import functools
import io
import itertools
import tempfile
import threading
import time
from pathlib import Path

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from scripts.measure.result import CannotMeasure, NotMeasured, Number, median
from scripts.measure.shards import write_synthetic
from scripts.measure.step import Times, random_batch, random_rows, run_steps
from stackjax.checkpoint.directory import absolute
from stackjax.config import CheckpointConfig, Config, EvaluationConfig, Schedule, Stage
from stackjax.data.device import local_rows, put
from stackjax.data.loader import train_batches
from stackjax.data.manifest import MANIFEST
from stackjax.data.mixture import Mixture
from stackjax.data.open import Source, open_train
from stackjax.files.rows_file import NO_ROWS
from stackjax.model import ModelConfig
from stackjax.run.goodput import Clock
from stackjax.run.profiler import Profiler
from stackjax.run.progress import open_progress
from stackjax.run.run import Run
from stackjax.run.sinks import open_sinks
from stackjax.run.train import run_phase
from stackjax.sharding.partition import num_shards
from stackjax.training.batches import data_order
from stackjax.training.compile import compile_step, new_state, step_inputs
from stackjax.training.expand import expand
from stackjax.training.phase import Phase
from stackjax.training.run_history import NEW_RUN
from stackjax.training.train_state import TrainState, placed

BLOCK_STEPS = 50
NUM_BLOCKS = 8
LOOP_STEPS = BLOCK_STEPS * (1 + NUM_BLOCKS) + 1  # the first block warms up


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loader:
    """The run's loader alone, at full speed."""

    tokens_per_second: float
    """Tokens per second in this process."""
    source: str
    """Token shards: the config's path, or `synthetic`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Host:
    """The training loop's overhead."""

    loop_seconds: float
    """Per step of a tiny model, in the training loop."""
    bare_seconds: float
    """Per step of the same model, on one batch, without the loop."""
    overhead_seconds: float
    """Difference: metrics, checks, reading and sending the tiny batches."""
    put_seconds: float
    """Time to put a batch on the devices; a thread does so a step early."""
    share_of_step: Number
    """Overhead over this phase's median step."""


def measure_loader(config: Config, phase: Phase, mesh: Mesh, num_batches: int) -> Loader:
    """Returns the loader's speed for a phase, with full prefetch queues."""
    ahead = config.data.prefetch * (1 + config.data.num_workers) + 1
    num_rows = phase.batch_size // phase.accumulate
    with tempfile.TemporaryDirectory() as directory:
        sources = _sources(config, phase, Path(directory))
        if sources[0].path == directory:
            phase = dataclasses.replace(phase, mixture=Mixture(weights=(1.0,)))
        batches = train_batches(
            sources,
            config.data,
            data_order(sources, config.seed, (phase,)),
            first_example=phase.start.examples,
            batch_size=phase.batch_size,
            accumulate=phase.accumulate,
            rows=local_rows(mesh, num_rows),
        )
        for _ in range(ahead):
            tokens = next(batches).tokens.size
        start = time.perf_counter()
        for _ in range(num_batches):
            next(batches)
        seconds = time.perf_counter() - start
    return Loader(
        tokens_per_second=tokens * num_batches / seconds,
        source="synthetic" if sources[0].path == directory else sources[0].path,
    )


def _sources(config: Config, phase: Phase, directory: Path) -> tuple[Source, ...]:
    """Returns the config's token shards, or synthetic shards if missing."""
    paths = [source.path for source in config.data.all_sources]
    if all((epath.Path(path) / MANIFEST).exists() for path in paths):
        return open_train(config.data, config.model.vocab_size, phase.seq_len)
    return (write_synthetic(directory, config.model.vocab_size, phase.seq_len),)


class _Ticks(threading.Event):
    """Never set; records the time of each check, before every step."""

    def __init__(self):
        super().__init__()
        self.times: list[float] = []

    def is_set(self) -> bool:
        self.times.append(time.perf_counter())
        return False


def measure_host(config: Config, phase: Phase, mesh: Mesh, times: Times | NotMeasured) -> Host:
    """Returns the training loop's overhead per step.

    Args:
      times: Times for the phase's own step.

    Raises:
      CannotMeasure: There are several processes.
    """
    if jax.process_count() > 1:
        raise CannotMeasure("the loop is measured in one process")
    with tempfile.TemporaryDirectory() as directory:
        tiny = _tiny_config(config, phase, directory)
        tiny_phase, _ = expand(tiny)
        loop_seconds, state = _loop_seconds(tiny, tiny_phase)
    bare_seconds = _bare_seconds(tiny, tiny_phase, mesh, state)
    overhead = loop_seconds - bare_seconds
    share = NotMeasured("the step itself was not measured")
    return Host(
        loop_seconds=loop_seconds,
        bare_seconds=bare_seconds,
        overhead_seconds=overhead,
        put_seconds=_put_seconds(config, phase, mesh),
        share_of_step=overhead / times.median_seconds if isinstance(times, Times) else share,
    )


def _tiny_config(config: Config, phase: Phase, directory: str) -> Config:
    """Returns a tiny model's run on a phase's mesh, with the same logging interval in steps."""
    seq_len, batch_size = 16, num_shards("batch")
    step_tokens = seq_len * batch_size
    steps_per_row = max(1, config.logging.every_tokens // phase.per_step.tokens)
    stage = Stage(tokens=LOOP_STEPS * step_tokens, batch_size=batch_size)
    never = 2 * LOOP_STEPS * step_tokens
    return Config(
        model=ModelConfig(
            vocab_size=256,
            num_layers=1,
            embed_dim=64,
            mlp_dim=64,
            num_heads=8,
            num_kv_heads=8,
            head_dim=8,
        ),
        data=dataclasses.replace(
            config.data,
            path=directory,
            sources=(),
            seq_len=seq_len,
            corpus=None,
            num_workers=0,
        ),
        optimizer=dataclasses.replace(config.optimizer, schedule=Schedule()),
        mesh=phase.mesh,
        # Measured in the first stage; a run evaluates at the end of the last.
        stages=(stage, stage),
        evaluation=EvaluationConfig(every_tokens=never, num_sequences=1, batch_size=1),
        checkpoints=CheckpointConfig(every_tokens=never),
        logging=dataclasses.replace(
            config.logging, every_tokens=steps_per_row * step_tokens, wandb_project=None
        ),
        workdir=f"{directory}/run",
    )


def _loop_seconds(config: Config, phase: Phase) -> tuple[float, TrainState]:
    """Returns a run's seconds per step in the first phase, and the last state.

    The seconds are for the median block.
    """
    workdir = absolute(config.workdir)
    path = Path(config.data.all_sources[0].path)
    source = write_synthetic(path, config.model.vocab_size, phase.seq_len)
    sinks = open_sinks(config, workdir, None, NO_ROWS)
    ticks = _Ticks()
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        progress = open_progress()
        run = Run(
            config=config,
            workdir=workdir,
            sources=(source,),
            validation=(source,),
            sinks=sinks,
            progress=progress,
            profiler=Profiler(config.logging, workdir, progress),
            clock=Clock(),
            stop=ticks,
            step_of=lambda phase, _: compile_step(config, phase),
            history=NEW_RUN,
            phases=expand(config),
        )
        for output in (*run.sinks, run.progress):
            stack.enter_context(contextlib.closing(output))
        state = placed(phase, new_state(config, phase))
        state, _ = run_phase(run, phase, state, phase.start)
    blocks = np.diff(ticks.times[BLOCK_STEPS::BLOCK_STEPS]).tolist()
    return median(blocks) / BLOCK_STEPS, state


def _bare_seconds(config: Config, phase: Phase, mesh: Mesh, state: TrainState) -> float:
    """Returns the same without a loop around the step."""
    step, blocks = functools.partial(compile_step(config, phase), step_inputs(phase)), []
    batch = random_batch(config, phase, mesh)
    for _ in range(1 + NUM_BLOCKS):
        seconds, state = run_steps(step, state, batch, BLOCK_STEPS)
        blocks.append(seconds)
    return median(blocks[1:]) / BLOCK_STEPS


def _put_seconds(config: Config, phase: Phase, mesh: Mesh) -> float:
    rows, num_rows = random_rows(config, phase, mesh), phase.batch_size // phase.accumulate
    batches = put(itertools.repeat(rows, 1 + BLOCK_STEPS), mesh, num_rows)
    jax.block_until_ready(next(batches))
    start = time.perf_counter()
    for batch in batches:
        jax.block_until_ready(batch)
    return (time.perf_counter() - start) / BLOCK_STEPS
