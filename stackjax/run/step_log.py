"""Training metrics, written one step late."""

import contextlib
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from stackjax.checkpoint.save import Checkpoints
from stackjax.files.rows_file import Extent
from stackjax.model.flops import mfu
from stackjax.run.goodput import KIND as GOODPUT
from stackjax.run.hooks import StepInfo
from stackjax.run.run import Run
from stackjax.run.sinks import plain_values
from stackjax.run.watchdog import expect_step
from stackjax.training.phase import Counts, Phase

Metrics = Mapping[str, Any]
"""Arrays by name, still being computed."""

_FLAGS = ("is_finite", "is_spike")
"""Metrics without a field in rows."""


class StepLog:
    """Writes train rows one step late, so reading never stalls the devices.

    A step's metrics are read while the devices work on the next step, or at once if they are
    ready. Every metric becomes a field in the row. Only loss and gradient norm must be finite.
    """

    def __init__(self, run: Run, phase: Phase, checkpoints: Checkpoints, counts: Counts):
        self._run, self._phase, self._checkpoints = run, phase, checkpoints
        self._newest: tuple[int, Counts, Metrics] | None = None
        self._is_unread = self._is_due = False
        self._start = time.monotonic(), counts
        self._last_row = self._training_seconds(), counts
        self._settled_at = counts
        self._waited = 0.0
        """Seconds spent on waiting for devices since the last row."""
        if phase.index > 0 and counts == phase.start:
            run.clock.switch("seam")  # until the first step's metrics are read

    def add(self, step: StepInfo, metrics: Metrics) -> None:
        """Adds a step's metrics; never waits for this step."""
        self.catch_up()
        stall = self._run.config.logging.stall_seconds
        if stall is not None:
            expect_step(None if step.ends_phase else stall)
        self._newest = step.step, step.counts, metrics
        # A row at an early end is written by `write_newest`, also after a restart.
        is_full_length = step.ends_phase and not step.stopped_early
        every = self._run.config.logging.every_tokens
        self._is_unread, self._is_due = True, is_full_length or step.reaches_multiple(every)
        if metrics["is_finite"].is_ready():
            self.catch_up()

    def catch_up(self) -> None:
        """Reads the newest step, and writes a row if due.

        Raises:
          FloatingPointError: The loss or the gradient norm is not finite, or a spike.
        """
        if self._newest is None or not self._is_unread:
            return
        self._is_unread = False
        start = time.monotonic()
        is_finite = bool(self._newest[2]["is_finite"])  # waits for the step
        self._waited += time.monotonic() - start
        self._run.clock.switch("step")
        if not is_finite:
            raise self._not_taken(*self._newest)
        if self._newest[2].get("is_spike", False):
            self._write_spike(*self._newest)
        if self._is_due:
            self.write_newest()

    def write_newest(self) -> None:
        """Writes the newest step's row, if not written yet."""
        if self._newest is None or self._newest[1] == self._last_row[1]:
            return
        step, counts, metrics = self._newest
        (then, before), now = self._last_row, self._training_seconds()
        self._last_row = now, counts
        rate = (counts.tokens - before.tokens) / (now - then)
        per_token = self._phase.per_step.flops / self._phase.per_step.tokens
        speed = {
            "seconds": now - then,
            "tokens_per_second": rate,
            "num_devices": jax.device_count(),
            "mfu": mfu(rate * per_token, jax.devices()),
        }
        row = self._run.write("train", self._phase, step, counts, **_values(metrics), **speed)
        end = self._run.phases[-1].end
        seconds_left = self._seconds_left(time.monotonic(), counts, end)
        self._run.progress.row(row, end.tokens, seconds_left)
        num_steps = (counts.tokens - before.tokens) / self._phase.per_step.tokens
        self._report_lateness((now - then) / num_steps, self._waited / num_steps)
        self._waited = 0.0

    def _report_lateness(self, step_seconds: float, waited: float) -> None:
        """Compares the hosts' own seconds per step, and writes a row if a host is late."""
        late = self._run.watchdog.report(step_seconds - waited, step_seconds)
        if late is not None and self._newest is not None:
            values, line = late
            self._run.write("late", self._phase, *self._newest[:2], **values)
            self._run.progress.note(line)

    def settle(self) -> Extent:
        """Writes a goodput row, and returns the extent of all rows, which are on disk.

        Raises:
          FloatingPointError: The loss or the gradient norm is not finite.
        """
        self.catch_up()
        with self._run.clock.measure("checkpoint"):
            self._write_goodput()
            return self._run.flush()

    def _write_goodput(self) -> None:
        """Writes a goodput row, unless there is one at this step."""
        if self._newest is None or self._newest[1] == self._settled_at:
            return
        step, self._settled_at, _ = self._newest
        values = self._run.clock.values()
        self._run.write(GOODPUT, self._phase, step, self._settled_at, **values)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Writes the row that is due, and counts the time inside as evaluation."""
        self.catch_up()
        with self._run.clock.measure("evaluation"):
            yield

    def _training_seconds(self) -> float:
        """Returns the run's seconds in steps, with the first steps after growth."""
        return self._run.clock.seconds("step", "seam")

    def _seconds_left(self, now: float, counts: Counts, end: Counts) -> float:
        """Returns the seconds until the run ends, at the phase's FLOP/s so far."""
        then, before = self._start
        return (end.flops - counts.flops) * (now - then) / (counts.flops - before.flops)

    def _write_spike(self, step: int, counts: Counts, metrics: Metrics) -> None:
        """Writes a row about a loss spike.

        Raises:
          FloatingPointError: The run stops at spikes.
        """
        names = ("loss", "loss_limit", "grad_norm", "grad_norm_limit")
        values = _values({name: metrics[name] for name in names})
        self._run.write("spike", self._phase, step, counts, **values)
        loss, loss_limit, norm, norm_limit = values.values()
        spike = (
            f"loss spike: loss {loss:.4g} (limit {loss_limit:.4g}), gradient norm {norm:.4g} "
            f"(limit {norm_limit:.4g})"
        )
        if self._run.config.spikes.action == "stop":
            raise self._not_taken(step, counts, metrics, f"spikes.action is 'stop', {spike}; ")
        self._run.progress.note(f"{counts.tokens:,} tokens: {spike}; the step was skipped")

    def _not_taken(
        self, step: int, counts: Counts, metrics: Metrics, reason: str = ""
    ) -> FloatingPointError:
        """Returns the error for a loss or gradient norm that is not finite or a spike."""
        self._run.flush()
        self._checkpoints.wait()
        values, stage = _values(metrics), self._phase.stage
        newest, way_out = self._checkpoints.latest_step, "there is no checkpoint yet"
        if newest is not None:
            way_out = (
                f"the last good checkpoint is {self._checkpoints.directory / str(newest)}. "
                f"Start the run again with a lower learning rate or clip_norm, or with "
                f"--skip-examples {counts.examples - self._phase.counts(newest).examples} to "
                f"leave out the data since then"
            )
        return FloatingPointError(
            f"{reason}loss {values['loss']:.4g}, gradient norm {values['grad_norm']:.4g} at "
            f"learning rate {values['learning_rate']:.3g} in step {step:,} of stage {stage}, "
            f"after {counts.tokens:,} tokens; the step was not taken, and {way_out}."
        )


def _values(metrics: Metrics) -> dict[str, Any]:
    """Returns a step's metrics as numbers or lists of numbers."""
    return plain_values({name: metrics[name] for name in metrics if name not in _FLAGS})
