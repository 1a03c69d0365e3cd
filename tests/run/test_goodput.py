"""Seconds by class add up, nest and survive restarts."""

import json

import pytest

from stackjax.run import goodput
from stackjax.run.goodput import KIND, Clock, describe_goodput


@pytest.fixture
def now(monkeypatch):
    """A list with the present time, to change."""
    time = [100.0]
    monkeypatch.setattr(goodput.time, "monotonic", lambda: time[0])
    return time


def spend(clock, now):
    """1 s other, 2 s seam with 4 s evaluation inside, 8 s step."""
    now[0] += 1
    with clock.measure("seam"):
        now[0] += 1
        with clock.measure("evaluation"):
            now[0] += 4
        now[0] += 1
    clock.switch("step")
    now[0] += 8


def test_each_second_belongs_to_one_class(now):
    clock = Clock()
    spend(clock, now)
    values = clock.values()
    assert values.pop("goodput") == 8 / 15
    spent = {name: seconds for name, seconds in values.items() if seconds}
    assert spent == {
        "other_seconds": 1,
        "seam_seconds": 2,
        "evaluation_seconds": 4,
        "step_seconds": 8,
    }
    assert clock.seconds("step", "seam") == 10


def test_failure_ends_a_class(now):
    clock = Clock()
    with pytest.raises(OSError), clock.measure("checkpoint"):
        now[0] += 1
        raise OSError
    now[0] += 2
    assert (clock.seconds("checkpoint"), clock.seconds("other")) == (1, 2)


def test_resumed_clock_continues_the_newest_row(now):
    first, second = Clock(), Clock()
    spend(first, now)
    row = {"kind": KIND, **first.values()}
    second.resume([{"kind": KIND, "step_seconds": 7.0}, row, {"kind": "train"}])
    now[0] += 1
    assert second.seconds("step") == 8
    assert second.seconds("other") == 1 + 15 + 1  # since its own start too


def test_summary_has_one_line_about_the_newest_row(now):
    clock = Clock()
    spend(clock, now)
    line = describe_goodput([{"kind": KIND, "goodput": 0.0}, {"kind": KIND, **clock.values()}])
    assert "53.3 %" in line and "15.0 s" in line and "seam 2.0" in line
    assert describe_goodput([{"kind": "train"}]) is None


def test_rows_of_a_run_have_seconds_at_each_checkpoint(uncut):
    rows = [json.loads(line) for line in (uncut / "metrics.jsonl").read_text().splitlines()]
    found = [row for row in rows if row["kind"] == KIND]
    places = [(row["phase"], row["step"]) for row in found]
    assert places == [(0, 3), (0, 6), (0, 8), (1, 0), (1, 1), (1, 4), (1, 7), (1, 8)]
    for row in found:
        seconds = [value for name, value in row.items() if name.endswith("_seconds")]
        assert row["goodput"] == pytest.approx(row["step_seconds"] / sum(seconds))
    first, last = found[0], found[-1]
    assert first["seam_seconds"] == 0 < last["seam_seconds"]
    assert all(first[name] <= last[name] for name in first if name.endswith("_seconds"))
