"""A run's data, outputs and position, shared by all phases."""

import dataclasses
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh

from stackjax.config import Config
from stackjax.data.batch import Batch
from stackjax.data.open import Source
from stackjax.data.order import epochs_read
from stackjax.data.source_metrics import by_source
from stackjax.data.sources import TokenSource
from stackjax.files.rows_file import Extent
from stackjax.run.goodput import Clock
from stackjax.run.profiler import Profiler
from stackjax.run.progress import Progress
from stackjax.run.sinks import Row, Sink, flush_all
from stackjax.run.watchdog import Watchdog
from stackjax.runtime.errors import UserError
from stackjax.training.batches import data_order, phase_batches
from stackjax.training.expand import expand
from stackjax.training.phase import Counts, EarlyEnd, Phase
from stackjax.training.run_history import RunHistory, write_history


@dataclasses.dataclass(kw_only=True)
class Run:
    """A run's data, outputs and position. Only `commit` changes a field."""

    config: Config
    workdir: epath.Path
    sources: tuple[Source, ...]
    """Sequences for training, by source."""
    validation: tuple[TokenSource, ...]
    """Sequences for validation, by source."""
    sinks: list[Sink]
    progress: Progress
    profiler: Profiler
    clock: Clock
    """Seconds by class."""
    stop: threading.Event
    """Set by a signal to stop."""
    step_of: Callable[[Phase, Phase | None], jax.stages.Compiled | None]
    """(phase, next phase) -> the phase's compiled step; None after a signal to stop."""
    history: RunHistory
    """The position, as committed to the run directory."""
    phases: tuple[Phase, ...]
    """All phases, as far as currently known."""
    watchdog: Watchdog = dataclasses.field(default_factory=Watchdog)

    def commit(self, history: RunHistory) -> None:
        """Writes a new position to the run directory, and derives the phases again."""
        write_history(self.workdir, history)
        self.history, self.phases = history, expand(self.config, history)

    def ended_at(self, phase: Phase, step: int, reason: str = "") -> RunHistory:
        """Returns the position if a phase's stage ends at a step of the phase."""
        fit_steps = sum(
            p.num_steps for p in self.phases[: phase.index] if p.stage == phase.stage
        )
        early_end = EarlyEnd(steps=fit_steps + step, reason=reason)
        return dataclasses.replace(
            self.history, ended={**self.history.ended, phase.stage: early_end}
        )

    def write(self, kind: str, phase: Phase, step: int, counts: Counts, **values: Any) -> Row:
        """Writes a metrics row and returns the row."""
        where = {"kind": kind, "phase": phase.index, "stage": phase.stage, "step": step}
        row = where | dataclasses.asdict(counts)
        if repeated := sorted(row.keys() & values.keys()):
            raise UserError(f"metric {repeated[0]} of a {kind} row is taken; rename it.")
        row |= values
        for sink in self.sinks:
            sink.write(row)
        return row

    def write_changes(self, phase: Phase, step: int, counts: Counts) -> None:
        """Writes and shows the user's changes at this position."""
        here = (phase.index, step)
        changes = [str(c) for c in self.history.changes if (c.phase, c.step) == here]
        for change in changes:
            self.progress.note(f"changed {change}")
        if changes:
            self.write("change", phase, step, counts, change="; ".join(changes))

    def flush(self) -> Extent:
        """Brings all metrics to disk, and returns the rows' extent."""
        return flush_all(self.sinks)

    def batches(
        self,
        phase: Phase,
        mesh: Mesh,
        counts: Counts,
        num_steps: int,
        phases: Sequence[Phase] | None = None,
    ) -> Iterator[Batch]:
        """Returns the batches for the next steps of a phase, on the devices.

        Args:
          phases: Other phases that end at other steps, in place of the run's.
        """
        phases = self.phases if phases is None else phases
        first = counts.examples
        return phase_batches(self.sources, self.config, phases, phase, mesh, first, num_steps)

    def epochs(self, counts: Counts) -> dict[str, float]:
        """Returns how often each source was read, as metrics."""
        order = data_order(self.sources, self.config.seed, self.phases)
        names = by_source("epochs", [source.name for source in self.sources])
        return dict(zip(names, map(float, epochs_read(order, counts.examples)), strict=True))
