"""A pool of worker processes; all end at once if a call fails."""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def run_in_processes(
    function: Callable[[Item], Result], items: Sequence[Item], num_processes: int
) -> Iterator[tuple[int, Result]]:
    """Yields the index and result of each item, in order of completion.

    The first error is raised at once and ends all processes. With `num_processes` 1 this
    process makes all calls, in order.

    Raises:
      OSError: A worker process was killed.
    """
    if num_processes <= 1:
        yield from enumerate(map(function, items))
        return
    with _worker_pool(num_processes) as pool:
        running = {pool.submit(function, item): index for index, item in enumerate(items)}
        try:
            for call in futures.as_completed(running):
                yield running[call], call.result()
        except futures.process.BrokenProcessPool as error:
            raise OSError(
                "a worker process was killed, perhaps for lack of memory; "
                "try a smaller --num-processes."
            ) from error


def run_in_process(function: Callable[..., Result], *args: Any) -> Result:
    """Returns the result of a call in a worker process.

    The process ends at once when this process fails or dies, also within a library that
    ignores Ctrl-C.

    Raises:
      BrokenProcessPool: The worker process was killed.
    """
    with _worker_pool(1) as pool:
        return pool.submit(function, *args).result()


@contextlib.contextmanager
def _worker_pool(num_processes: int) -> Iterator[futures.ProcessPoolExecutor]:
    """Yields a pool; all workers end at once when this process fails or dies."""
    context = multiprocessing.get_context("spawn")
    reader, writer = context.Pipe(duplex=False)
    with (
        reader,
        futures.ProcessPoolExecutor(
            num_processes, context, initializer=_exit_with, initargs=(reader,)
        ) as pool,
        writer,
    ):
        yield pool


def _exit_with(parent: Any) -> None:
    """Ends this worker process when the parent closes the connection."""

    def watch() -> None:
        with contextlib.suppress(EOFError, OSError):
            parent.recv()
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # The parent ends this worker.
    threading.Thread(target=watch, daemon=True).start()
