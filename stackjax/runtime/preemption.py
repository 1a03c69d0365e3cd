"""Graceful shutdown on SIGTERM, SIGHUP or Ctrl-C."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator

import jax
from jax.experimental import multihost_utils

EXIT_CODE = 128 + signal.SIGTERM

_NOTICE = b"\nstopping: the run saves after this step and ends; a second signal kills it\n"


@contextlib.contextmanager
def stop_on_signals() -> Iterator[threading.Event]:
    """Yields an event that the first SIGTERM, SIGHUP or Ctrl-C sets instead of killing.

    A second signal kills the process.
    """
    stop = threading.Event()
    several = jax.process_count() > 1
    previous = {}

    def request(number: int, _: object) -> None:
        stop.set()
        # Unlike print, os.write is safe inside a signal handler.
        os.write(1, _NOTICE)
        for each, handler in previous.items():
            signal.signal(each, handler)
        if several:
            signal.raise_signal(signal.SIGTERM)

    # With several processes JAX handles SIGTERM, so that all stop at the same step.
    numbers = [signal.SIGINT, signal.SIGHUP] + ([] if several else [signal.SIGTERM])
    # Under `nohup`, keep ignoring SIGHUP.
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
        numbers.remove(signal.SIGHUP)
    for number in numbers:
        previous[number] = signal.signal(number, request)
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def should_stop(stop: threading.Event, step: int) -> bool:
    """Returns whether to stop before the next step, the same value in every process.

    Args:
      step: Steps of the run so far, over all phases. JAX needs an increasing count.
    """
    if jax.process_count() > 1:
        return multihost_utils.reached_preemption_sync_point(step)
    return stop.is_set()
