"""Late hosts are named; a stalled step prints stacks."""

import sys
import time
import types

import pytest

from stackjax.run import watchdog as module
from stackjax.run.watchdog import Watchdog, expect_step, late_hosts

# Own seconds by process, seconds per step, late processes.
CASES = [
    ([0.1, 0.1, 0.1, 0.9], 1.0, [3]),
    ([0.9, 0.1, 0.1, 0.8], 1.0, [0, 3]),
    ([0.1, 0.1, 0.1, 0.1], 1.0, []),
    ([0.001, 0.001, 0.009], 1.0, []),  # hidden behind the devices' work
    ([0.9, 0.9, 0.9], 1.0, []),  # all hosts alike
]


@pytest.mark.parametrize(("own", "step", "late"), CASES)
def test_late_host_is_far_above_the_median_and_matters(own, step, late):
    assert late_hosts(own, step) == late


class Client:
    """JAX's key-value store."""

    def __init__(self):
        self.values = {}

    def key_value_set(self, key, value):
        assert key not in self.values
        self.values[key] = value

    def key_value_dir_get(self, prefix):
        return [(key, value) for key, value in self.values.items() if key.startswith(prefix)]

    def key_value_delete(self, prefix):
        self.values = {k: v for k, v in self.values.items() if not k.startswith(prefix)}


def report(monkeypatch, client, watchdogs, own):
    """Sends all processes' reports, process 0 first; returns the result in process 0."""
    results = []
    for process, (watchdog, seconds) in enumerate(zip(watchdogs, own, strict=True)):
        state = types.SimpleNamespace(
            client=client, process_id=process, num_processes=len(watchdogs)
        )
        monkeypatch.setattr(module.distributed, "global_state", state)
        results.append(watchdog.report(seconds, 1.0))
    assert results[1:] == [None] * (len(results) - 1)
    return results[0]


def test_reports_are_compared_one_row_late(monkeypatch):
    client, watchdogs = Client(), [Watchdog() for _ in range(3)]
    assert report(monkeypatch, client, watchdogs, [0.1, 0.1, 0.8]) is None
    values, line = report(monkeypatch, client, watchdogs, [0.1, 0.1, 0.1])
    assert values == {
        "late": [2],
        "seconds_by_process": [0.1, 0.1, 0.8],
        "step_seconds": 1.0,
    }
    assert "process 2 on " in line
    assert report(monkeypatch, client, watchdogs, [0.1, 0.1, 0.1]) is None
    assert len(client.values) == 3  # old reports are deleted


def test_single_process_reports_nothing():
    assert Watchdog().report(0.9, 1.0) is None


def test_stalled_step_prints_stacks(tmp_path, monkeypatch):
    with open(tmp_path / "stderr", "w+") as stderr:
        monkeypatch.setattr(sys, "__stderr__", stderr)
        expect_step(0.01)
        expect_step(None)
        time.sleep(0.05)
        assert (tmp_path / "stderr").read_text() == ""
        expect_step(0.01)
        time.sleep(0.2)
        expect_step(None)
        # Perhaps without this thread: only the newest 100 threads are printed.
        printed = (tmp_path / "stderr").read_text()
        assert printed.startswith("Timeout") and "most recent call first" in printed
