"""Background checkpoints for a phase."""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

from etils import epath
from orbax.checkpoint import v1 as ocp

from stackjax.checkpoint.contents import Contents, form_of, to_json
from stackjax.checkpoint.directory import saved_steps
from stackjax.checkpoint.lineage import Generation, begin, spend
from stackjax.checkpoint.regular import regular_steps
from stackjax.checkpoint.restore import read_contents
from stackjax.checkpoint.saved_state import DamagedError, read_array_types, to_save
from stackjax.config import CheckpointConfig
from stackjax.files.rows_file import NO_ROWS, Extent
from stackjax.runtime.errors import UserError
from stackjax.training.phase import Change, Counts, Phase
from stackjax.training.spikes import SpikeStatistics
from stackjax.training.train_state import TrainState

_RESUMES = "those before it are whole, and the same command resumes from the newest"


@dataclasses.dataclass(frozen=True)
class _KeepEvery:
    """Keeps the first checkpoint past every `keep_every_tokens` tokens."""

    phase: Phase
    keep_every_tokens: int

    def should_preserve(
        self, checkpoints: Sequence[ocp.training.CheckpointMetadata], *, context: Any
    ) -> list[bool]:
        def multiples(step: int) -> int:
            tokens = self.phase.counts(step).tokens
            return tokens // self.keep_every_tokens

        return [c.step > 0 and multiples(c.step) > multiples(c.step - 1) for c in checkpoints]


@dataclasses.dataclass(frozen=True)
class _KeepRegular:
    """Keeps the last regular checkpoints, also after a signal to stop."""

    directory: epath.Path
    phase: Phase
    config: CheckpointConfig

    def should_preserve(
        self, checkpoints: Sequence[ocp.training.CheckpointMetadata], *, context: Any
    ) -> list[bool]:
        steps = [c.step for c in checkpoints]
        regular = regular_steps(self.directory, self.phase, self.config.every_tokens, steps)
        return [step in regular[-self.config.keep_last :] for step in steps]


class Checkpoints:
    """Checkpoints for a single phase, saved in the background; a context manager.

    Args:
      workdir: The run directory.
      phase: The phase.
      config: How many checkpoints to keep.
      lineage: Earlier models, for the phase's first checkpoint.
      changes: Changes by the user.
    """

    def __init__(
        self,
        workdir: epath.Path,
        phase: Phase,
        config: CheckpointConfig,
        lineage: Sequence[Generation] = (),
        changes: Sequence[Change] = (),
    ):
        self._phase, self._changes = phase, tuple(changes)
        self._config = config
        self._first_lineage = tuple(lineage)
        self.directory = workdir / phase.directory
        self.latest_step: int | None = max(saved_steps(self.directory), default=None)
        """Step for the newest checkpoint, perhaps not yet complete on disk."""

    def __enter__(self) -> "Checkpoints":
        self._checkpointer = _open(self.directory, self._preservation_policy())
        return self

    def __exit__(self, *_: object) -> None:
        with _as_os_error(self.directory, _RESUMES):
            self._checkpointer.close()

    def _preservation_policy(self) -> Any:
        policies = ocp.training.preservation_policies
        regular: Any = _KeepRegular(self.directory, self._phase, self._config)
        kept = [policies.LatestN(self._config.keep_last), regular]
        if self._config.keep_every_tokens is not None:
            every: Any = _KeepEvery(self._phase, self._config.keep_every_tokens)
            kept.append(every)
        return policies.AnyPreservationPolicy(kept)

    @functools.cached_property
    def _lineage(self) -> tuple[Generation, ...]:
        """All models so far, the present model last."""
        if self.latest_step is None:
            return begin(self._first_lineage, self._phase)
        return read_contents(self.directory / str(self.latest_step)).lineage

    def save(
        self,
        step: int,
        state: TrainState,
        counts: Counts,
        rows: Extent = NO_ROWS,
        spikes: SpikeStatistics | None = None,
    ) -> None:
        """Starts saving; the state may be donated as soon as this returns.

        Args:
          rows: Metric rows so far, already on disk.
          spikes: Running statistics for loss spikes.

        Raises:
          OSError: This checkpoint or the previous checkpoint could not be written.
        """
        if step == self.latest_step:
            return
        lineage = spend(self._lineage, self._phase, step, self._changes)
        model, is_model = self._phase.model, self._phase.trains_model(step)
        form = form_of(self._phase.optimizer)
        metadata = to_json(Contents(counts, model, is_model, lineage, rows, form, spikes))
        with _as_os_error(self.directory, _RESUMES):
            self._checkpointer.save_async(
                step, to_save(state), force=True, custom_metadata=metadata
            )
        self.latest_step = step

    def wait(self) -> None:
        """Waits until all checkpoints are complete on disk; OSError after a failure."""
        with _as_os_error(self.directory, _RESUMES):
            self._checkpointer.wait()


def _open(directory: epath.Path, keep: Any) -> ocp.training.Checkpointer:
    """Returns a checkpointer for a directory, without incomplete checkpoints.

    Orbax reads a file in every checkpoint, so a run reports damage at the start.

    Raises:
      UserError: A checkpoint is damaged.
    """
    try:
        return ocp.training.Checkpointer(
            directory, preservation_policy=keep, cleanup_tmp_directories=True
        )
    except Exception:  # Orbax raises various types, without the checkpoint.
        for step in saved_steps(directory):
            try:
                read_array_types(directory / str(step))
            except DamagedError as error:
                raise UserError(f"{error}; remove this directory, and start again.") from error
        raise


def write_first(directory: epath.Path, state: TrainState, contents: Contents) -> epath.Path:
    """Writes a state as a directory's first checkpoint, atomically.

    Raises:
      OSError: The checkpoint could not be written.
    """
    with (
        _as_os_error(directory, "nothing there is whole"),
        ocp.training.Checkpointer(directory) as checkpointer,
    ):
        checkpointer.save(0, to_save(state), force=True, custom_metadata=to_json(contents))
    return directory / "0"


@contextlib.contextmanager
def _as_os_error(directory: epath.Path, what_is_left: str) -> Iterator[None]:
    try:
        yield
    except (ValueError, OSError) as error:  # TensorStore raises ValueError on a full disk.
        raise OSError(
            f"a checkpoint could not be written to {directory}: {error}; {what_is_left}."
        ) from error
