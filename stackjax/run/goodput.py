"""Seconds of a run by class, and goodput: the share of seconds spent on training steps."""

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, get_args

TimeClass = Literal["compile", "step", "evaluation", "checkpoint", "restore", "seam", "other"]
"""`seam`: growth, compilation and first step of the next phase. `evaluation`: all hooks."""

KIND = "goodput"
"""The kind of rows with seconds by class."""


class Clock:
    """A run's seconds by class. Every moment belongs to a single class: the innermost."""

    def __init__(self):
        self._seconds: dict[str, float] = dict.fromkeys(get_args(TimeClass), 0.0)
        self._present: TimeClass = "other"
        self._since = time.monotonic()

    @contextlib.contextmanager
    def measure(self, name: TimeClass) -> Iterator[None]:
        """Adds the time inside the block to a class."""
        before = self._present
        self.switch(name)
        try:
            yield
        finally:
            self.switch(before)

    def switch(self, name: TimeClass) -> None:
        """Adds the time from now on to a class, until the enclosing block ends."""
        now = time.monotonic()
        self._seconds[self._present] += now - self._since
        self._present, self._since = name, now

    def seconds(self, *names: TimeClass) -> float:
        """Returns the seconds so far in some classes."""
        self.switch(self._present)
        return sum(self._seconds[name] for name in names)

    def resume(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Adds the seconds before a restart, from a run's rows."""
        before = _newest(rows)
        for name in self._seconds:
            self._seconds[name] += before.get(_field(name), 0.0)

    def values(self) -> dict[str, float]:
        """Returns a row's values: goodput, and the seconds in each class."""
        self.switch(self._present)
        total = sum(self._seconds.values())
        fields = {_field(name): seconds for name, seconds in self._seconds.items()}
        return {"goodput": self._seconds["step"] / total, **fields}


def describe_goodput(rows: Sequence[Mapping[str, Any]]) -> str | None:
    """Returns the summary's line about a run's seconds; None for runs without such rows."""
    row = _newest(rows)
    if not row:
        return None
    seconds = {name: row[_field(name)] for name in get_args(TimeClass)}
    shares = ", ".join(f"{name} {value:.1f}" for name, value in seconds.items())
    return f"goodput {100 * row['goodput']:.1f} % of {sum(seconds.values()):.1f} s: {shares}"


def _newest(rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    return next((row for row in reversed(rows) if row["kind"] == KIND), {})


def _field(name: str) -> str:
    """Returns a class's field in rows; `step` alone is a coordinate."""
    return f"{name}_seconds"
