"""Metrics of training steps, written one step late."""

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import jax

from stackjax.checkpoint.save import Checkpoints
from stackjax.files.rows_file import Extent
from stackjax.model.flops import mfu
from stackjax.run.run import Run
from stackjax.training.phase import Counts, Phase


class LateRows:
    """Rows of training. Each step is read as soon as that holds nothing up: while the devices
    work on the step after it, or at once if it is done."""

    def __init__(self, run: Run, phase: Phase, checkpoints: Checkpoints, counts: Counts):
        self._run = run
        self._phase = phase
        self._checkpoints = checkpoints
        self._newest: tuple[int, Counts, dict[str, jax.Array]] | None = None
        self._is_due = self._is_read = self._is_written = False
        self._start = self._since = time.monotonic(), counts

    def add(
        self, step: int, counts: Counts, metrics: dict[str, jax.Array], is_due: bool
    ) -> None:
        """Takes a step's metrics, which become a row if one is due; never waits."""
        self._newest = step, counts, metrics
        self._is_due, self._is_read, self._is_written = is_due, False, False
        is_finite: Any = metrics["is_finite"]
        if is_finite.is_ready():
            self.catch_up()

    def catch_up(self) -> None:
        """Reads the newest step and writes its row if one is due.

        Raises:
          FloatingPointError: Its loss or gradient is not finite.
        """
        if self._newest is not None and not self._is_read:
            self._is_read = True
            if not self._newest[2]["is_finite"]:
                raise self._not_finite()
        if self._is_due:
            self.write_newest()

    def write_newest(self) -> None:
        """Writes the row of the newest step, due or not."""
        if self._newest is None or self._is_written:
            return
        self._is_written = True
        step, counts, _ = self._newest
        (then, before), now = self._since, time.monotonic()
        self._since = now, counts
        per_token = self._phase.per_step.flops / self._phase.per_step.tokens
        rate = (counts.tokens - before.tokens) / (now - then)
        measured = {
            "seconds": now - then,
            "tokens_per_second": rate,
            "num_devices": jax.device_count(),
            "mfu": mfu(rate * per_token, jax.devices()),
        }
        values = self._values() | measured
        row = self._run.write("train", self._phase, step, counts, **values)
        self._run.progress.row(row, self._seconds_left(now, counts))

    def settle(self) -> Extent:
        """Checks that all steps are finite, and brings their rows to disk.

        Returns the rows there are.
        """
        self.catch_up()
        return self._run.flush()

    def _values(self) -> dict[str, float]:
        """Returns the metrics of the newest step, as numbers."""
        assert self._newest is not None, "a step has been added"
        metrics = jax.device_get(self._newest[2])
        return {name: float(metrics[name]) for name in metrics if name != "is_finite"}

    def _seconds_left(self, now: float, counts: Counts) -> float:
        """Returns the seconds to the end of the run, at the FLOP/s of this phase so far."""
        then, before = self._start
        left = self._run.phases[-1].end.flops - counts.flops
        return left * (now - then) / (counts.flops - before.flops)

    def _not_finite(self) -> FloatingPointError:
        """Returns the error of a step whose loss or gradient is not finite."""
        self._run.flush()
        self._checkpoints.wait()
        assert self._newest is not None, "a step has been added"
        (step, counts, _), values, stage = self._newest, self._values(), self._phase.stage
        newest, way_out = self._checkpoints.latest_step, "there is no checkpoint yet"
        if newest is not None:
            way_out = (
                f"the last good checkpoint is {self._checkpoints.directory / str(newest)}. "
                f"Start the run again with a lower learning rate or clip_norm, or with "
                f"--skip-examples {counts.examples - self._phase.counts(newest).examples} to "
                f"leave out the data since then"
            )
        return FloatingPointError(
            f"loss {values['loss']:.4g}, gradient norm {values['grad_norm']:.4g} at learning "
            f"rate {values['learning_rate']:.3g} in step {step:,} of stage {stage}, after "
            f"{counts.tokens:,} tokens; the step was not taken, and {way_out}."
        )

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Writes the row that is due, and leaves the time inside out of the tokens/s."""
        self.catch_up()
        start = time.monotonic()
        yield
        then, counts = self._since
        self._since = then + time.monotonic() - start, counts
