"""Train steps compiled in the background, and an exit that does not wait for them."""

import contextlib
import dataclasses
import multiprocessing
import os
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from concurrent import futures
from typing import Any, TypeVar

import jax

from stackjax.checkpoint.saved_state import compile_checksums
from stackjax.config import Config
from stackjax.training.compile import compile_step
from stackjax.training.phase import Counts, Phase, Waypoint

T = TypeVar("T")

_COMPILING = "compiling"
"""Name of the threads that compile."""
_SECONDS_TO_NOTICE = 0.2
"""How long a signal to stop may wait while a step is compiled."""


def compile_ahead(
    config: Config, stop: threading.Event
) -> Callable[[Phase, Phase | None], jax.stages.Compiled | None]:
    """Returns a function from each phase, in turn, and the next, to its compiled step.

    The function returns None if the run is told to stop before the step is compiled.

    On a CPU, where that was measured to cost the training nothing, more is compiled while a
    phase trains: the checksums of its checkpoints, and the next phase's step and checksums.
    These are as foreseen then; a stage that ends early may change them.
    """
    ahead: dict[Phase, futures.Future[jax.stages.Compiled]] = {}
    # Several processes stop together, between two steps.
    seconds = _SECONDS_TO_NOTICE if jax.process_count() == 1 else None

    def start(phase: Phase) -> futures.Future[jax.stages.Compiled]:
        step = _in_thread(lambda: compile_step(config, phase))
        if jax.default_backend() == "cpu":
            # After the step, which the training waits for.
            _in_thread(lambda: futures.wait([step]) and compile_checksums(config, phase))
        return step

    def step_of(phase: Phase, following: Phase | None) -> jax.stages.Compiled | None:
        compiling = ahead.get(_as_compiled(phase)) or start(phase)
        while not futures.wait([compiling], seconds).done:
            if stop.is_set():
                return None
        ahead.clear()
        if jax.default_backend() == "cpu" and following is not None:
            ahead[_as_compiled(following)] = start(following)
        return compiling.result()

    return step_of


def _in_thread(function: Callable[[], T]) -> "futures.Future[T]":
    """Returns the future result of a function, in a thread that ends with it."""
    future: futures.Future[T] = futures.Future()

    def run() -> None:
        try:
            future.set_result(function())
        except BaseException as error:  # raised again where the result is asked for
            future.set_exception(error)

    threading.Thread(target=run, name=_COMPILING).start()
    return future


@contextlib.contextmanager
def ends_while_compiling() -> Iterator[None]:
    """Ends the process after the block if a step is still being compiled.

    Only for the outermost block of a process. Nothing can interrupt the compiler, and at exit
    Python would wait for it, perhaps for minutes. Half an entry of the compilation cache is
    removed at the next start.
    """
    try:
        yield
    except BaseException as error:
        if _is_compiling() and not isinstance(error, SystemExit):
            traceback.print_exception(error)
        _leave_if_compiling(error.code if isinstance(error, SystemExit) else 1)
        raise
    _leave_if_compiling(0)


def _is_compiling() -> bool:
    return any(thread.name == _COMPILING for thread in threading.enumerate())


def _leave_if_compiling(code: Any) -> None:
    if not _is_compiling():
        return
    if jax.distributed.is_initialized():
        jax.distributed.shutdown()
    for child in multiprocessing.active_children():
        child.terminate()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)


def _as_compiled(phase: Phase) -> Phase:
    """Returns a phase without its start and its end, on which its step does not depend."""
    waypoint = Waypoint(step=0, counts=Counts(tokens=phase.first_tokens))
    return dataclasses.replace(phase, start=Counts(), waypoint=waypoint, num_steps=0)
