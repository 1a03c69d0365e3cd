"""The position that a run starts from: the beginning, its newest checkpoint or an older one."""

import dataclasses
from collections.abc import Mapping

from etils import epath

from stackjax.checkpoint import discard_after, newest_step, read_contents
from stackjax.config import Config
from stackjax.config_file import (
    changed_fields,
    check_same_data,
    is_of_training,
    record_config,
)
from stackjax.data.manifest import Manifest
from stackjax.errors import UserError
from stackjax.marker import (
    NEW_RUN,
    Marker,
    after_entering,
    check_phase,
    read_marker,
    write_marker,
)
from stackjax.phase import Change, Phase, Waypoint
from stackjax.phases import expand
from stackjax.quantity import Count
from stackjax.runtime.constraints import Checked


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResumeConfig(Checked):
    """How a run goes on after a bad loss or a damaged checkpoint."""

    resume_from: str = ""
    """Checkpoint to go back to: its step in the present phase, such as `400`, or with its
    phase, such as `stage_0/train/400`. Newer checkpoints and rows are discarded. The same
    command run again does not go back twice."""
    skip_examples: Count = 0
    """Examples of the data to leave out from there on."""


NEWEST = ResumeConfig()
"""A run that goes on from its newest checkpoint."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Position:
    """Where a run starts from."""

    marker: Marker
    step: int | None
    """The checkpoint of the present phase to restore; None if the run is new."""
    is_finished: bool
    changed: Mapping[str, str]
    """By its name, a line for each field that differs from the recorded config."""


def start(
    workdir: epath.Path, config: Config, options: ResumeConfig, manifest: Manifest
) -> Position:
    """Returns the position that a run starts from, and commits it and the config.

    Going back, skipped examples and changed fields are part of the marker before anything is
    trained, so that a run that is killed and started again comes to the same position.

    Raises:
      UserError: The run cannot be resumed in this way.
      OSError: A file could not be read or written.
    """
    found = find_position(workdir, config, options)
    if found.step is not None:
        check_same_data(workdir, manifest)
        discard_after(workdir, _present(config, found.marker), found.step)
    # First the marker: what a kill between the two repeats is then the same change again.
    write_marker(workdir, found.marker)
    record_config(workdir, config, manifest)
    return found


def find_position(workdir: epath.Path, config: Config, options: ResumeConfig) -> Position:
    """Returns the position that a run would start from, and changes nothing.

    Raises:
      UserError: The run cannot be resumed in this way, or a checkpoint is missing.
    """
    marker = read_marker(workdir)
    if marker.phase == 0 and newest_step(workdir, expand(config)[0]) is None:
        # A run that has saved nothing binds no other.
        _check_is_resumed(options)
        marker = after_entering(NEW_RUN, None, expand(config)[0])
        return Position(marker=marker, step=None, is_finished=False, changed={})
    if not marker.directory:
        # A run of which only the first stage is left has lost no more than this.
        marker = after_entering(marker, None, expand(config)[0])
    phase = _present(config, marker)
    changed = changed_fields(workdir, config, phase.stage)
    if any(field.startswith(_lengths(phase.stage)) for field in changed):
        ended = {at: ending for at, ending in marker.ended.items() if at != phase.stage}
        marker = dataclasses.replace(marker, ended=ended)
    fields = tuple(line for field, line in changed.items() if is_of_training(field))
    if not fields and _is_applied(options, marker):
        options = NEWEST
    step = _newest(workdir, config, phase) if not options.resume_from else None
    if options.resume_from:
        phase, step = _named_checkpoint(workdir, expand(config, marker), marker, options)
        marker = _gone_back(marker, phase)
    assert step is not None, "a run that is resumed has a checkpoint"
    if fields or options != NEWEST:
        marker = _with_change(workdir, marker, phase, step, fields, options)
    phases = expand(config, marker)
    is_finished = marker.phase == len(phases) - 1 and step == phases[-1].num_steps
    return Position(marker=marker, step=step, is_finished=is_finished, changed=changed)


def _check_is_resumed(options: ResumeConfig) -> None:
    if options != NEWEST:
        raise UserError(
            "--resume-from and --skip-examples are for a run that has saved a checkpoint, and "
            "this one has not; leave them out."
        )


def _present(config: Config, marker: Marker) -> Phase:
    """Returns the phase that a run is in; UserError if its config no longer has it."""
    phases = expand(config, marker)
    check_phase(epath.Path(config.workdir), marker, phases)
    return phases[marker.phase]


def _lengths(stage: int) -> tuple[str, ...]:
    """Returns the fields that decide when a stage ends."""
    return tuple(f"stages.{stage}.{name}" for name in ("until.", "tokens", "fraction"))


def _newest(workdir: epath.Path, config: Config, phase: Phase) -> int:
    """Returns the step of the newest checkpoint of a phase; UserError if it has none."""
    step = newest_step(workdir, phase)
    if step is None:
        before = expand(config)[phase.index - 1].directory
        raise UserError(
            f"{workdir / phase.directory} has no checkpoint, but the run is in stage "
            f"{phase.stage}; bring it back, go back to the stage before with --resume-from "
            f"{before}/STEP, or start a new run with --workdir."
        )
    return step


def _with_change(
    workdir: epath.Path,
    marker: Marker,
    phase: Phase,
    step: int,
    fields: tuple[str, ...],
    options: ResumeConfig,
) -> Marker:
    """Returns a marker with a change at a step, from where the run is counted anew."""
    counts = read_contents(workdir / phase.directory / str(step))[0].counts
    known = marker.waypoints.get(phase.index)
    if known is not None and known.step == step and not options.resume_from:
        counts = known.counts  # Examples may have been skipped there.
    counts = dataclasses.replace(counts, examples=counts.examples + options.skip_examples)
    change = Change(
        phase=phase.index,
        step=step,
        tokens=counts.tokens,
        fields=fields,
        **dataclasses.asdict(options),
    )
    changes = marker.changes if marker.changes[-1:] == (change,) else (*marker.changes, change)
    waypoints = {**marker.waypoints, phase.index: Waypoint(step=step, counts=counts)}
    return dataclasses.replace(marker, waypoints=waypoints, changes=changes)


def _is_applied(options: ResumeConfig, marker: Marker) -> bool:
    """Returns whether the newest change was these options: the same command came again."""
    return bool(marker.changes) and options == ResumeConfig(
        resume_from=marker.changes[-1].resume_from,
        skip_examples=marker.changes[-1].skip_examples,
    )


def _named_checkpoint(
    workdir: epath.Path, phases: tuple[Phase, ...], marker: Marker, options: ResumeConfig
) -> tuple[Phase, int]:
    """Returns the phase and the step of the checkpoint that the user names."""
    directory, _, name = options.resume_from.rpartition("/")
    directory = directory or phases[marker.phase].directory
    phase = next((p for p in phases[: marker.phase + 1] if p.directory == directory), None)
    path = workdir / directory / name
    if phase is None or not name.isdecimal() or not path.is_dir():
        raise UserError(
            f"--resume-from is {options.resume_from!r}, and there is no checkpoint {path}; "
            f"name the step of one, such as 400, or stage_0/train/400."
        )
    return phase, int(name)


def _gone_back(marker: Marker, phase: Phase) -> Marker:
    """Returns the marker of a run that is in an earlier phase again, or in the same one."""
    waypoints = {i: each for i, each in marker.waypoints.items() if i < phase.index}
    ended = {stage: each for stage, each in marker.ended.items() if stage < phase.stage}
    back = dataclasses.replace(marker, waypoints=waypoints, ended=ended)
    return after_entering(back, None, phase)
