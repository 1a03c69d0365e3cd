"""Compilation of all phases before the first token."""

import functools
import sys
import time
from collections.abc import Callable

import jax

from stackjax.run.progress import Progress
from stackjax.run.resume import Position
from stackjax.runtime.errors import UserError, memory_used_by
from stackjax.runtime.preemption import EXIT_CODE
from stackjax.sharding.platform import platform_of, target_device
from stackjax.training.phase import Phase
from stackjax.training.program_memory import ProgramMemory, program_memory

StepOf = Callable[[Phase, Phase | None], jax.stages.Compiled | None]
"""(phase, next phase) -> the phase's compiled step; None after a signal to stop."""


def compile_all(
    position: Position, step_of: StepOf, progress: Progress, memory: int | None
) -> None:
    """Compiles the train steps of all phases from a position on, and shows their memory.

    The compilation cache keeps all steps. The present phase comes last, so `step_of` still has
    its step in memory.

    Args:
      memory: Bytes on each device; None if unknown.

    Raises:
      UserError: A step takes more memory than a device has.
      SystemExit: After a signal to stop.
    """
    platform, known = platform_of(target_device()), set()
    for phase in reversed(position.phases[position.phase.index :]):
        has_ended = phase is position.phase and position.step == phase.num_steps
        if has_ended or phase.program in known:
            continue
        known.add(phase.program)
        start = time.monotonic()
        with memory_used_by(functools.partial(_place, phase)):
            step = step_of(phase, None)
        if step is None:
            progress.note("stopped before training; nothing was changed")
            sys.exit(EXIT_CODE)
        taken, seconds = program_memory(step, platform), time.monotonic() - start
        progress.note(_describe(phase, taken, memory, seconds))
        _check_fits(phase, taken, memory)


def _place(phase: Phase) -> str:
    return f"the train step of stage {phase.stage}"


def _describe(phase: Phase, taken: ProgramMemory, memory: int | None, seconds: float) -> str:
    """Returns a line about a compiled step."""
    of = "" if memory is None else f" of {_gib(memory)}"
    return (
        f"stage {phase.stage}, {phase.name}: the train step takes {_gib(taken.peak)}{of} on "
        f"each device ({_parts(taken)}), compiled in {seconds:.1f} s"
    )


def _parts(taken: ProgramMemory) -> str:
    return f"arguments {_gib(taken.arguments)}, temporaries {_gib(taken.temporaries)}"


def _check_fits(phase: Phase, taken: ProgramMemory, memory: int | None) -> None:
    if memory is not None and taken.peak > memory:
        raise UserError(
            f"stages.{phase.stage}: the train step takes {_gib(taken.peak)} on each device "
            f"({_parts(taken)}), which has {_gib(memory)}; use a larger "
            f"{phase.batch_field}.accumulate than {phase.accumulate}, a larger mesh.fsdp, "
            f"stages.{phase.stage}.remat 'full', or more devices."
        )


def _gib(num_bytes: int) -> str:
    """Returns a size in GiB, with more digits for small models."""
    size = num_bytes / 2**30
    return f"{size:.2f} GiB" if size >= 0.1 else f"{size:.3g} GiB"
