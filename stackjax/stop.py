"""Being asked to stop: SIGTERM or Ctrl-C, on one host or on many."""

import contextlib
import signal
import threading
from collections.abc import Iterator

import jax
from jax.experimental import multihost_utils

EXIT_CODE = 128 + signal.SIGTERM


@contextlib.contextmanager
def stop_on_signals() -> Iterator[threading.Event]:
    """Yields an event that SIGTERM, or the first Ctrl-C, sets instead of killing."""
    stop = threading.Event()

    several = jax.process_count() > 1

    def request(number: int, _: object) -> None:
        stop.set()
        signal.signal(number, previous[number])  # the second one is meant at once
        if several:
            signal.raise_signal(signal.SIGTERM)

    previous = {}
    # With several processes JAX listens for SIGTERM, so that all agree on the step.
    numbers = [signal.SIGINT] if several else [signal.SIGINT, signal.SIGTERM]
    for number in numbers:
        previous[number] = signal.signal(number, request)
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def should_stop(stop: threading.Event, step: int) -> bool:
    """Returns whether to stop before the next step; the same in every process.

    Args:
      step: Steps of the run so far, over all its phases: JAX counts on from call to call.
    """
    if jax.process_count() > 1:
        return multihost_utils.reached_preemption_sync_point(step)
    return stop.is_set()
