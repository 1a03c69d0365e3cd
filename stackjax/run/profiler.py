"""Profiler traces (XProf) of a window of training steps."""

import contextlib
import signal
import threading
from collections.abc import Iterator

import jax
from etils import epath

from stackjax.config import LoggingConfig
from stackjax.files.storage import is_remote
from stackjax.run.progress import Progress
from stackjax.runtime.errors import UserError

_DIRECTORY = "profile"


class Profiler:
    """Traces the config's window of steps, and a window after each SIGUSR1.

    A context manager: at its end, also after a signal to stop, an open trace is written.
    """

    def __init__(self, config: LoggingConfig, workdir: epath.Path, progress: Progress):
        self._first, self._num_steps = config.profile_from, config.profile_steps
        self._directory, self._progress = workdir / _DIRECTORY, progress
        self._requested = threading.Event()
        self._last: int | None = None
        """The last step of the open trace."""

    def __enter__(self) -> "Profiler":
        self._previous = signal.signal(signal.SIGUSR1, lambda *_: self._requested.set())
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGUSR1, self._previous)
        self._stop()

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Annotates a step in the trace; a due trace starts before it.

        Args:
          number: Steps of the run including this step, over all phases.
        """
        if self._last is None and (number == self._first or self._requested.is_set()):
            self._start(number)
        with jax.profiler.StepTraceAnnotation("train", step_num=number):
            yield

    def end_step(self, number: int, result: jax.Array) -> None:
        """Ends the trace after its last step.

        Args:
          result: An output of the step.
        """
        if self._last is not None and number >= self._last:
            result.block_until_ready()
            self._stop()

    def _start(self, number: int) -> None:
        self._requested.clear()
        if is_remote(self._directory):
            self._progress.note("no profiler trace, because the run directory is in a bucket")
            return
        self._last = number + self._num_steps - 1
        jax.profiler.start_trace(str(self._directory))

    def _stop(self) -> None:
        if self._last is None:
            return
        self._last = None
        jax.profiler.stop_trace()
        self._progress.note(f"wrote a profiler trace to {self._directory}")


def check_profile(config: LoggingConfig, workdir: epath.Path) -> None:
    """Raises UserError for a trace in a bucket, which XProf cannot write."""
    if config.profile_from is not None and is_remote(workdir):
        raise UserError(
            f"logging.profile_from is {config.profile_from}, and the run directory is "
            f"{workdir}; a profiler trace needs a directory on a disk: leave it out, or change "
            f"--workdir."
        )
