"""Worker pools: results and errors."""

import os
import signal
import threading
import time

import pytest

from stackjax.runtime.errors import UserError
from stackjax.runtime.worker_pool import run_in_process, run_in_processes


def wait(seconds: float) -> float:
    if seconds < 0:
        raise UserError(f"cannot wait for {seconds} seconds")
    time.sleep(seconds)
    return seconds


@pytest.mark.parametrize("num_processes", [1, 2])
def test_every_result_has_the_index_of_its_item(num_processes):
    items = [0.2, 0.0, 0.1]
    assert dict(run_in_processes(wait, items, num_processes)) == dict(enumerate(items))


def test_first_error_ends_all_processes_at_once():
    start = time.monotonic()
    with pytest.raises(UserError, match="cannot wait for -1 seconds"):
        list(run_in_processes(wait, [600, -1, 600], 2))
    assert time.monotonic() - start < 300


def test_call_in_a_process_returns_the_result_or_raises():
    assert run_in_process(wait, 0.0) == 0.0
    with pytest.raises(UserError, match="cannot wait for -1 seconds"):
        run_in_process(wait, -1)


def test_interrupt_ends_a_call_in_a_process_at_once():
    start = time.monotonic()
    # A background process of a shell ignores SIGINT.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Timer(1, os.kill, (os.getpid(), signal.SIGINT)).start()
    try:
        with pytest.raises(KeyboardInterrupt):
            run_in_process(wait, 600)
    finally:
        signal.signal(signal.SIGINT, before)
    assert time.monotonic() - start < 300
