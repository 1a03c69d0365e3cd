"""What all phases of a run share, and the rows it writes while it trains."""

import contextlib
import dataclasses
import itertools
import math
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
from stackjax.marker import write_marker
from stackjax.metrics import Sink, read_rows
from stackjax.phase import Counts, Ending, Phase
from stackjax.phases import expand
from stackjax.progress import Progress
from stackjax.summary import describe_probe
from stackjax.trigger import Evaluation


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """What all phases of a run share."""

    config: Config
    workdir: epath.Path
    source: TokenSource
    held_out: TokenSource
    sinks: list[Sink]
    progress: Progress
    stop: threading.Event
    step_of: Callable[[Phase, Phase | None], jax.stages.Compiled]
    """The compiled step of a phase, given the next one."""
    ended: dict[int, Ending]
    """The stages that have ended early, so far."""
    tasks: tuple[Tasks, Tokenization] | None
    """What the model is scored on, and by which tokens; None if on nothing."""

    @property
    def phases(self) -> tuple[Phase, ...]:
        """All phases, as far as is known."""
        return expand(self.config, self.ended)

    def write(self, kind: str, phase: Phase, step: int, counts: Counts, **values: Any) -> None:
        """Writes a row of metrics."""
        where = {"kind": kind, "phase": phase.index, "stage": phase.stage, "step": step}
        row = where | dataclasses.asdict(counts) | values
        for sink in self.sinks:
            sink.write(row)
        if kind == "train":
            self.progress.row(row)

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

    def flush(self) -> None:
        """Brings all metrics to disk."""
        for sink in self.sinks:
            sink.flush()

    def evaluations(self, phase: Phase, counts: Counts) -> list[Evaluation]:
        """Returns the evaluations of a phase so far, as the file of metrics has them."""
        if counts == phase.start:
            return []  # and no file of a long run is read, from a bucket perhaps
        return [
            (row["tokens"] - phase.start.tokens, row["held_out_loss"])
            for row in read_rows(self.workdir)
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
        self.ended[phase.stage] = Ending(steps=sum(before) + step, reason=reason)
        write_marker(self.workdir, phase, self.ended)
        self.progress.expect(self.phases[-1].end.tokens)
        return self.phases[phase.index]

    def write_ending(self, phase: Phase, step: int, counts: Counts) -> None:
        """Writes that a stage has ended early, and why."""
        reason = self.ended[phase.stage].reason
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
    """Rows of training, each read while the devices already work on a later step."""

    def __init__(self, run: Run, phase: Phase, checkpoints: Checkpoints, counts: Counts):
        self._run = run
        self._phase = phase
        self._checkpoints = checkpoints
        self._newest: tuple[int, Counts, dict[str, jax.Array]] | None = None
        self._is_due = self._is_written = False
        self._since = time.monotonic(), counts.tokens

    def add(
        self, step: int, counts: Counts, metrics: dict[str, jax.Array], is_due: bool
    ) -> None:
        """Takes a step's metrics, which become a row where one is due; never waits."""
        self._newest = step, counts, metrics
        self._is_due, self._is_written = is_due, False

    def catch_up(self) -> None:
        """Writes the row that is waiting, if any; FloatingPointError if it is not finite."""
        if self._newest is None or self._is_written or not self._is_due:
            return
        self._is_written = True
        step, counts, _ = self._newest
        values: dict[str, Any] = dict(self._read())
        (then, tokens), now = self._since, time.monotonic()
        self._since = now, counts.tokens
        values["seconds"] = now - then
        rate = values["tokens_per_second"] = (counts.tokens - tokens) / (now - then)
        per_token = self._phase.per_step.flops / self._phase.per_step.tokens
        values["num_devices"] = jax.device_count()
        values["mfu"] = mfu(rate * per_token, jax.devices())
        self._run.write("train", self._phase, step, counts, **values)

    def write_newest(self) -> None:
        """Writes the row of the newest step, due or not; FloatingPointError as above."""
        self._is_due = True
        self.catch_up()

    def settle(self) -> None:
        """Makes sure that all up to the newest step is finite, and its rows on disk."""
        self.catch_up()
        self._read()
        self._run.flush()

    def _read(self) -> dict[str, float]:
        if self._newest is None:
            return {}
        _, counts, metrics = self._newest
        values = {name: float(value) for name, value in metrics.items()}
        if all(math.isfinite(value) for value in values.values()):
            return values
        self._run.flush()
        self._checkpoints.wait()
        step = self._checkpoints.latest_step
        good = "there is no checkpoint yet"
        if step is not None:
            good = f"the last good checkpoint is {self._checkpoints.directory / str(step)}"
        raise FloatingPointError(
            f"loss {values['loss']}, gradient norm {values['grad_norm']} after "
            f"{counts.tokens:,} tokens in stage {self._phase.stage}; {good}."
        )

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Writes the row that is waiting, and leaves what is done then out of the tokens/s."""
        self.catch_up()
        start = time.monotonic()
        yield
        then, tokens = self._since
        self._since = then + time.monotonic() - start, tokens
