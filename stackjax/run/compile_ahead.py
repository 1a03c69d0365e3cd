"""Compilation in the background, and an exit that does not wait for the compiler."""

import contextlib
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
from stackjax.training.phase import Phase

T = TypeVar("T")

_COMPILING = "compiling"
"""Name of compiling threads."""
_SECONDS_TO_NOTICE = 0.2
"""Time from a signal to stop until a waiting run ends."""


def compile_ahead(
    config: Config, stop: threading.Event
) -> Callable[[Phase, Phase | None], jax.stages.Compiled | None]:
    """Returns a function (phase, next phase) -> the phase's compiled train step.

    The function returns None after a signal to stop. The newest steps are kept: a probe of the
    next phase and the phase itself share the step.

    On a CPU, checkpoint checksums and the next phase's step are compiled while a phase trains.
    This does not slow down training, as measured.
    """
    # By program: after an early end, the next phase needs other inputs, not another step.
    ahead: dict[Phase, futures.Future[jax.stages.Compiled]] = {}
    # Several processes stop together, so a single process cannot stop here.
    seconds = _SECONDS_TO_NOTICE if jax.process_count() == 1 else None

    def start(phase: Phase) -> futures.Future[jax.stages.Compiled]:
        step = _in_thread(lambda: compile_step(config, phase))
        if jax.default_backend() == "cpu":
            # After the step, because training waits for the step.
            _in_thread(lambda: futures.wait([step]) and compile_checksums(phase))
        return step

    def step_of(phase: Phase, following: Phase | None) -> jax.stages.Compiled | None:
        compiling = ahead.get(phase.program) or start(phase)
        ahead.clear()
        ahead[phase.program] = compiling
        while not futures.wait([compiling], seconds).done:
            if stop.is_set():
                return None
        if following is not None and jax.default_backend() == "cpu":
            ahead[following.program] = ahead.get(following.program) or start(following)
        return compiling.result()

    return step_of


def _in_thread(function: Callable[[], T]) -> "futures.Future[T]":
    """Returns the future result of a function, computed in a new thread."""
    future: futures.Future[T] = futures.Future()

    def run() -> None:
        try:
            future.set_result(function())
        except BaseException as error:  # raised again by `result`
            future.set_exception(error)

    threading.Thread(target=run, name=_COMPILING).start()
    return future


@contextlib.contextmanager
def ends_while_compiling() -> Iterator[None]:
    """Ends the process after the block if a step is still being compiled.

    Only for the outermost block of a process. Python cannot interrupt the compiler, and would
    wait for minutes at exit. The next start removes incomplete entries in the compilation
    cache.
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
