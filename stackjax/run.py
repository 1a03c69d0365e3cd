"""What all phases of a run share, and the rows it writes while it trains."""

import contextlib
import dataclasses
import itertools
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh

from stackjax.checkpoint import Checkpoints
from stackjax.config import Config
from stackjax.data.batch import Batch
from stackjax.data.device import local_rows, put
from stackjax.data.loader import train_batches
from stackjax.data.sources import TokenSource
from stackjax.data.tokenization import Tokenization
from stackjax.flops import mfu
from stackjax.interop.tasks import Tasks
from stackjax.marker import Marker, write_marker
from stackjax.metrics import Row, Sink, flush_all
from stackjax.phase import Counts, Ending, Phase
from stackjax.phases import expand
from stackjax.progress import Progress
from stackjax.rows_file import Extent, read_rows
from stackjax.runtime.agreement import from_process_0
from stackjax.summary import describe_probe
from stackjax.trigger import Evaluation


@dataclasses.dataclass(kw_only=True)
class Run:
    """What all phases of a run share. Only its position changes, by `commit`."""

    config: Config
    workdir: epath.Path
    source: TokenSource
    held_out: TokenSource
    sinks: list[Sink]
    progress: Progress
    stop: threading.Event
    step_of: Callable[[Phase, Phase | None], jax.stages.Compiled | None]
    """The compiled step of a phase, given the next one; None if told to stop before."""
    marker: Marker
    """The position of the run."""
    phases: tuple[Phase, ...]
    """All phases, as far as is known at this position."""
    tasks: tuple[Tasks, Tokenization] | None
    """What the model is scored on, and by which tokens; None if on nothing."""

    def commit(self, marker: Marker) -> None:
        """Writes another position of the run to its directory, and goes on from there."""
        write_marker(self.workdir, marker)
        self.marker, self.phases = marker, expand(self.config, marker)

    def write(self, kind: str, phase: Phase, step: int, counts: Counts, **values: Any) -> Row:
        """Writes a row of metrics and returns it."""
        where = {"kind": kind, "phase": phase.index, "stage": phase.stage, "step": step}
        row = where | dataclasses.asdict(counts) | values
        for sink in self.sinks:
            sink.write(row)
        return row

    def write_layers(
        self,
        phase: Phase,
        step: int,
        counts: Counts,
        found: dict[str, list[float]],
        before: dict[str, list[float]] | None = None,
    ) -> None:
        """Writes a row of what layers are, and were before a growth, if that was measured."""
        earlier = {f"{name}_before": values for name, values in (before or {}).items()}
        if found:
            self.write("layers", phase, step, counts, **found, **earlier)

    def write_changes(self, phase: Phase, step: int, counts: Counts) -> None:
        """Writes and shows the changes that the user has made at this position."""
        here = (phase.index, step)
        changes = [str(c) for c in self.marker.changes if (c.phase, c.step) == here]
        for change in changes:
            self.progress.note(f"changed {change}")
        if changes:
            self.write("change", phase, step, counts, change="; ".join(changes))

    def flush(self) -> Extent:
        """Brings all metrics to disk, and returns the rows there are."""
        return flush_all(self.sinks)

    def evaluations(self, phase: Phase, counts: Counts) -> list[Evaluation]:
        """Returns the evaluations of a phase so far, as the file of metrics has them."""
        if counts == phase.start:
            return []  # and no file of a long run is read, from a bucket perhaps
        rows = from_process_0(lambda: read_rows(self.workdir))
        return [
            (row["tokens"] - phase.start.tokens, row["held_out_loss"])
            for row in rows
            if (row["kind"], row["phase"]) == ("evaluation", phase.index)
            and row["tokens"] <= counts.tokens
            and row["held_out_loss"] is not None
        ]

    def write_evaluation(
        self,
        phase: Phase,
        step: int,
        counts: Counts,
        loss: float,
        layers: dict[str, list[float]],
    ) -> None:
        """Writes and shows an evaluation."""
        self.write("evaluation", phase, step, counts, held_out_loss=loss)
        self.write_layers(phase, step, counts, layers)
        self.progress.note(f"{counts.tokens:,} tokens: held-out loss {loss:.4f}")

    def write_probe(
        self, phase: Phase, step: int, counts: Counts, before: float, found: dict[str, Any]
    ) -> None:
        """Writes and shows what a probe has found."""
        row = {"loss_before": before} | found
        self.write("probe", phase, step, counts, **row)
        self.progress.note(f"{counts.tokens:,} tokens: {describe_probe(row)}")

    def write_scores(
        self, phase: Phase, step: int, counts: Counts, scores: dict[str, float | None]
    ) -> None:
        """Writes and shows what the model has scored on tasks."""
        self.write("tasks", phase, step, counts, **scores)
        shown = (
            f"{name} {value:.4g}"
            for name, value in scores.items()
            if value is not None and "_stderr" not in name
        )
        self.progress.note(f"{counts.tokens:,} tokens: {', '.join(shown)}")

    def end_stage(self, phase: Phase, step: int, reason: str) -> Phase:
        """Commits that a stage is as long as it is now; returns the phase, which ends there.

        A run that is killed before it has saved this step comes to the same end.
        """
        before = [p.num_steps for p in self.phases if p.stage == phase.stage and p != phase]
        ending = Ending(steps=sum(before) + step, reason=reason)
        ended = {**self.marker.ended, phase.stage: ending}
        self.commit(dataclasses.replace(self.marker, ended=ended))
        self.progress.expect(self.phases[-1].end.tokens)
        return self.phases[phase.index]

    def write_ending(self, phase: Phase, step: int, counts: Counts) -> None:
        """Writes that a stage has ended early, and why."""
        reason = self.marker.ended[phase.stage].reason
        self.write("trigger", phase, step, counts, reason=reason)
        self.progress.note(f"{counts.tokens:,} tokens: stage {phase.stage} ends, as {reason}")

    def batches(
        self, phase: Phase, mesh: Mesh, counts: Counts, num_steps: int
    ) -> Iterator[Batch]:
        """Returns the batches of the next steps of a phase, on the devices."""
        num_rows = phase.batch_size // phase.accumulate
        batches = train_batches(
            self.source,
            self.config.data,
            seed=self.config.seed,
            first_example=counts.examples,
            batch_size=phase.batch_size,
            accumulate=phase.accumulate,
            rows=local_rows(mesh, num_rows),
        )
        return put(itertools.islice(batches, num_steps), mesh, num_rows)


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
