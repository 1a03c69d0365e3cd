"""What all phases of a run share, and the rows it writes while it trains."""

import dataclasses
import itertools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh

from stackjax.config import Config
from stackjax.data.batch import Batch
from stackjax.data.device import local_rows, put
from stackjax.data.loader import train_batches
from stackjax.data.sources import TokenSource
from stackjax.files.rows_file import Extent, read_rows
from stackjax.inference.tasks import Tasks
from stackjax.run.early_stop import Evaluation
from stackjax.run.metrics import Row, Sink, flush_all
from stackjax.run.progress import Progress
from stackjax.run.summary import describe_probe
from stackjax.runtime.agreement import from_process_0
from stackjax.tokenizer.tokenization import Tokenization
from stackjax.training.expand import expand
from stackjax.training.phase import Counts, Ending, Phase
from stackjax.training.run_position import Marker, write_marker


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
