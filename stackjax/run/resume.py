"""A run's start position: the beginning, the newest checkpoint or an older checkpoint."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar

from etils import epath

from stackjax.checkpoint import saved_state
from stackjax.checkpoint.directory import (
    discard_after,
    newest_step,
    older_checkpoints,
    saved_steps,
)
from stackjax.checkpoint.restore import read_or_advise
from stackjax.config import Config
from stackjax.config_file import changed_fields, check_same_data, is_of_training, record_config
from stackjax.data.manifest import Manifest
from stackjax.options import ResumeConfig
from stackjax.runtime.errors import UserError
from stackjax.training.expand import expand
from stackjax.training.phase import Change, Counts, Phase, Waypoint
from stackjax.training.run_history import (
    NEW_RUN,
    RunHistory,
    after_entering,
    check_phase,
    read_history,
    write_history,
)

T = TypeVar("T")


NEWEST = ResumeConfig()
"""Resume from the newest checkpoint."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Position:
    """A run's start position."""

    history: RunHistory
    phases: tuple[Phase, ...]
    """The run's phases, as far as currently known."""
    step: int | None
    """The present phase's step to restore; None for a new run."""
    changed: Mapping[str, str]
    """Field name -> a line that describes the change from the recorded config."""

    @property
    def phase(self) -> Phase:
        """The present phase."""
        return self.phases[self.history.phase]

    @property
    def is_finished(self) -> bool:
        """Whether the last phase has ended."""
        return self.phase is self.phases[-1] and self.step == self.phase.num_steps


def find_position(workdir: epath.Path, config: Config, options: ResumeConfig) -> Position:
    """Returns a run's start position, without changing any file.

    Raises:
      UserError: The run cannot be resumed like this, or a checkpoint is missing.
    """
    found = read_history(workdir)
    phases = expand(config, found)
    if found.phase == 0 and newest_step(workdir, phases[0]) is None:
        # A run without checkpoints does not constrain the next run.
        _check_is_resumed(options)
        history = after_entering(NEW_RUN, None, phases[0])
        phases = phases if found in (NEW_RUN, history) else expand(config)
        return Position(history=history, phases=phases, step=None, changed={})
    check_phase(workdir, found, phases)
    # If only the first stage is left, `directory` is all that is missing.
    history = found if found.directory else after_entering(found, None, phases[0])
    phase = phases[history.phase]
    changed = changed_fields(workdir, config, phase.stage, phase.part)
    if any(field.startswith(_lengths(phase.stage)) for field in changed):
        ended = {at: early_end for at, early_end in history.ended.items() if at != phase.stage}
        history = dataclasses.replace(history, ended=ended)
    fields = tuple(line for field, line in changed.items() if is_of_training(field))
    if not fields and _is_applied(options, history):
        options = NEWEST
    if options.resume_from:
        phase, step = _named_checkpoint(workdir, phases, history, options)
        history = _gone_back(history, phase)
    else:
        step = _newest(workdir, phases, phase)
    if fields or options != NEWEST:
        contents = read_or_go_back(
            workdir, phases[: phase.index + 1], step, saved_state.read_contents
        )
        history = _with_change(history, phase, step, contents.counts, fields, options)
    if history != found:
        phases = expand(config, history)
    return Position(history=history, phases=phases, step=step, changed=changed)


def commit_position(
    workdir: epath.Path, config: Config, position: Position, manifests: Sequence[Manifest]
) -> None:
    """Writes a run's start position and config.

    All changes are in the history before training begins, so a killed run resumes from the same
    position.

    Raises:
      UserError: The data has changed.
      OSError: A file could not be read or written.
    """
    if position.step is not None:
        check_same_data(workdir, manifests)
        discard_after(workdir, position.phase, position.step)
    # The history first: after a kill in between, the same change is found again.
    write_history(workdir, position.history)
    record_config(workdir, config, manifests)


def read_or_go_back(
    workdir: epath.Path, phases: Sequence[Phase], step: int, read: Callable[[epath.Path], T]
) -> T:
    """Returns what `read` returns for a checkpoint.

    Args:
      phases: The phases up to the checkpoint's phase.
      read: Raises DamagedError for a damaged checkpoint.

    Raises:
      UserError: The checkpoint is damaged. The message names an older readable checkpoint.
    """
    checkpoint = workdir / phases[-1].directory / str(step)

    def older() -> Iterator[epath.Path]:
        yield from older_checkpoints(checkpoint)
        for phase in reversed(phases[:-1]):
            directory = workdir / phase.directory
            yield from (directory / str(each) for each in reversed(saved_steps(directory)))

    return read_or_advise(
        checkpoint,
        read,
        older(),
        lambda path: f"add --resume-from {path.relative_to(workdir)}",
        "no checkpoint before it can be read: start a new run with --workdir, from another "
        "checkpoint with --init-from",
    )


def _check_is_resumed(options: ResumeConfig) -> None:
    if options != NEWEST:
        raise UserError(
            "--resume-from and --skip-examples need a checkpoint, and this run has none; leave "
            "both out."
        )


def _lengths(stage: int) -> tuple[str, ...]:
    """Returns the fields that determine when a stage ends."""
    return tuple(f"stages.{stage}.{name}" for name in ("until.", "tokens", "fraction"))


def _newest(workdir: epath.Path, phases: Sequence[Phase], phase: Phase) -> int:
    """Returns the newest checkpoint's step in a phase; UserError without a checkpoint."""
    step = newest_step(workdir, phase)
    if step is not None:
        return step
    known = [(each.directory, newest_step(workdir, each)) for each in phases[: phase.index]]
    places = [f"{directory}/{newest}" for directory, newest in known if newest is not None]
    way_back = f"go back with --resume-from {places[-1]}, " if places else ""
    raise UserError(
        f"{workdir / phase.directory} has no checkpoint, but the run is in stage "
        f"{phase.stage}; restore the directory, {way_back}or start a new run with --workdir."
    )


def _with_change(
    history: RunHistory,
    phase: Phase,
    step: int,
    counts: Counts,
    fields: tuple[str, ...],
    options: ResumeConfig,
) -> RunHistory:
    """Returns a history with a change at a step, and a waypoint with the counts there.

    Args:
      counts: The counts in the checkpoint at this step.
    """
    known = history.waypoints.get(phase.index)
    if known is not None and known.step == step and not options.resume_from:
        counts = known.counts  # with examples skipped earlier
    counts = dataclasses.replace(counts, examples=counts.examples + options.skip_examples)
    change = Change(
        phase=phase.index,
        step=step,
        tokens=counts.tokens,
        fields=fields,
        **dataclasses.asdict(options),
    )
    changes = (
        history.changes if history.changes[-1:] == (change,) else (*history.changes, change)
    )
    waypoints = {**history.waypoints, phase.index: Waypoint(step=step, counts=counts)}
    return dataclasses.replace(history, waypoints=waypoints, changes=changes)


def _is_applied(options: ResumeConfig, history: RunHistory) -> bool:
    """Returns whether the newest change has the same options: the command is repeated."""
    return bool(history.changes) and options == ResumeConfig(
        resume_from=history.changes[-1].resume_from,
        skip_examples=history.changes[-1].skip_examples,
    )


def _named_checkpoint(
    workdir: epath.Path, phases: tuple[Phase, ...], history: RunHistory, options: ResumeConfig
) -> tuple[Phase, int]:
    """Returns phase and step for `--resume-from`."""
    directory, _, name = options.resume_from.rpartition("/")
    directory = directory or phases[history.phase].directory
    phase = next((p for p in phases[: history.phase + 1] if p.directory == directory), None)
    path = workdir / directory / name
    if phase is None or name not in map(str, saved_steps(path.parent)):
        raise UserError(
            f"--resume-from is {options.resume_from!r}, but there is no checkpoint {path}; "
            f"give a step such as 400, or stage_0/train/400."
        )
    return phase, int(name)


def _gone_back(history: RunHistory, phase: Phase) -> RunHistory:
    """Returns a run's history after going back to a phase."""
    waypoints = {i: each for i, each in history.waypoints.items() if i < phase.index}
    ended = {stage: each for stage, each in history.ended.items() if stage < phase.stage}
    back = dataclasses.replace(history, waypoints=waypoints, ended=ended)
    return after_entering(back, None, phase)
