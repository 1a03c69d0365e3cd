"""Profiler traces of chosen steps, on request, and ended cleanly."""

import os
import signal

import jax.numpy as jnp
import pytest
from etils import epath

from stackjax.config import LoggingConfig
from stackjax.run import profiler as module
from stackjax.run.profiler import Profiler, check_profile
from stackjax.run.progress import Progress
from stackjax.runtime.errors import UserError


@pytest.fixture
def traced(monkeypatch):
    """All starts and stops of traces, and the steps."""
    events = []
    monkeypatch.setattr(module.jax.profiler, "start_trace", lambda path: events.append("start"))
    monkeypatch.setattr(module.jax.profiler, "stop_trace", lambda: events.append("stop"))
    return events


def logging(**fields):
    return LoggingConfig(every_tokens=1, **fields)


def run_steps(config, traced, tmp_path, numbers, *, signal_before=()):
    with Profiler(config, epath.Path(tmp_path), Progress()) as profiler:
        for number in numbers:
            if number in signal_before:
                os.kill(os.getpid(), signal.SIGUSR1)
            with profiler.step(number):
                traced.append(number)
            profiler.end_step(number, jnp.ones(()))


# Config, steps, steps with a signal before, and all events.
CASES = {
    "none": ({}, [1, 2], (), [1, 2]),
    "window": (
        {"profile_from": 2, "profile_steps": 2},
        range(1, 5),
        (),
        [1, "start", 2, 3, "stop", 4],
    ),
    "stopped inside": ({"profile_from": 2}, [1, 2, 3], (), [1, "start", 2, 3, "stop"]),
    "resumed after": ({"profile_from": 2}, [3, 4], (), [3, 4]),
    "signal": ({"profile_steps": 1}, [1, 2, 3], (2,), [1, "start", 2, "stop", 3]),
    "two signals": (
        {"profile_steps": 1},
        [1, 2, 3],
        (1, 3),
        ["start", 1, "stop", 2, "start", 3, "stop"],
    ),
}


@pytest.mark.parametrize(("fields", "numbers", "signals", "events"), CASES.values(), ids=CASES)
def test_trace_covers_its_steps(traced, tmp_path, fields, numbers, signals, events):
    before = signal.getsignal(signal.SIGUSR1)
    run_steps(logging(**fields), traced, tmp_path, numbers, signal_before=signals)
    assert traced == events
    assert signal.getsignal(signal.SIGUSR1) == before


def test_trace_is_written_into_the_run_directory(tmp_path):
    run_steps(logging(profile_from=1, profile_steps=1), [], tmp_path, [1, 2])
    assert list(tmp_path.glob("profile/**/*.xplane.pb"))


def test_trace_in_a_bucket_is_refused():
    check_profile(logging(), epath.Path("gs://bucket/run"))
    with pytest.raises(UserError, match=r"logging.profile_from is 3.*gs://bucket/run"):
        check_profile(logging(profile_from=3), epath.Path("gs://bucket/run"))
