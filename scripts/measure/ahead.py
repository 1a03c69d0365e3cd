"""Cost of compiling the next phase's step while training."""

import dataclasses
import functools
import time
from concurrent import futures

import jax

from scripts.measure.machine import check_time
from scripts.measure.result import CannotMeasure, seconds_of
from scripts.measure.step import WARMUP_STEPS, random_batch, run_steps
from stackjax.config import Config
from stackjax.sharding.mesh import build_mesh
from stackjax.training.compile import clear_programs, compile_step, new_state, step_inputs
from stackjax.training.phase import Phase
from stackjax.training.train_state import placed


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ahead:
    """The previous phase's steps, alone and while this phase's step compiles."""

    step_seconds: float
    """Step alone."""
    meanwhile_seconds: float
    """Step during compilation."""
    compile_seconds: float
    """Compilation alone."""
    compile_meanwhile_seconds: float
    """Compilation during steps."""
    saved_seconds: float
    """Extra time if compilation came first."""


def measure_ahead(
    config: Config, source: Phase, phase: Phase, num_steps: int, limit_seconds: float
) -> Ahead:
    """Returns the cost of compiling a phase's step while the previous phase trains.

    Raises:
      CannotMeasure: There are several processes, or too many steps for the limit.
    """
    if jax.process_count() > 1:
        raise CannotMeasure("compiling ahead is measured in one process")
    mesh = build_mesh(source.mesh)
    with jax.set_mesh(mesh):
        state = placed(source, new_state(config, source))
        batch = random_batch(config, source, mesh)
        step = functools.partial(compile_step(config, source), step_inputs(source))
        warm_up, state = run_steps(step, state, batch, WARMUP_STEPS)
        check_time(num_steps, warm_up / WARMUP_STEPS, limit_seconds)
        together, state = run_steps(step, state, batch, num_steps)
        clear_programs()
        compile_seconds, _ = seconds_of(lambda: compile_step(config, phase) and None)
        clear_programs()
        steps, start = 0, time.perf_counter()
        with futures.ThreadPoolExecutor(max_workers=1) as thread:
            compiled = thread.submit(compile_step, config, phase)
            while not compiled.done():
                _, state = run_steps(step, state, batch, 1)
                steps += 1
        elapsed = time.perf_counter() - start
        compiled.result()
    return Ahead(
        step_seconds=together / num_steps,
        meanwhile_seconds=elapsed / steps,
        compile_seconds=compile_seconds,
        compile_meanwhile_seconds=elapsed,
        saved_seconds=compile_seconds + steps * together / num_steps - elapsed,
    )
