"""Run position: the present phase, earlier phases' ends, and the user's changes."""

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence

import jax
from etils import epath

from stackjax.files.json_file import Fields, decode, read_object, seal, unseal
from stackjax.files.storage import replace_text
from stackjax.runtime.errors import UserError
from stackjax.training.phase import Change, EarlyEnd, Phase, Waypoint

_FILE = "phase.json"
_DIRECTORY = re.compile(r"stage_\d+/(fit|train(_\d+)?)")
_WAY_OUT = (
    "bring phase.json back from a copy of the run, or start a new run with --workdir, from a "
    "checkpoint of this one with --init-from"
)


@dataclasses.dataclass(frozen=True)
class RunHistory:
    """A run's position and history."""

    phase: int = 0
    """The present phase's index."""
    directory: str = ""
    """The present phase's checkpoint directory; empty for a new run."""
    ended: Mapping[int, EarlyEnd] = dataclasses.field(default_factory=dict)
    """Stages with an early end."""
    waypoints: Mapping[int, Waypoint] = dataclasses.field(default_factory=dict)
    """By phase index: each earlier phase's end, and the present phase's newest change."""
    changes: tuple[Change, ...] = ()
    """All changes at resumes, the newest last."""


NEW_RUN = RunHistory()


def read_history(workdir: epath.Path) -> RunHistory:
    """Returns a run's position; `NEW_RUN` for a new run.

    Raises:
      UserError: The file is damaged, or missing from a run beyond the first stage.
    """
    path = workdir / _FILE
    if not path.exists():
        if (workdir / "stage_1").exists():
            raise UserError(f"{workdir} has a stage_1, but no phase.json; {_WAY_OUT}.")
        return NEW_RUN
    return read_object(path, _WAY_OUT, _from_fields)


def _from_fields(fields: Fields) -> RunHistory:
    history = decode(RunHistory, unseal(fields))
    if not _DIRECTORY.fullmatch(history.directory):
        raise UserError(f"directory {history.directory!r} is no phase directory")
    return history


def check_phase(workdir: epath.Path, history: RunHistory, phases: Sequence[Phase]) -> None:
    """Raises UserError if the config does not have the present phase."""
    places = [phase.directory for phase in phases]
    if history.directory and places[history.phase : history.phase + 1] != [history.directory]:
        raise UserError(
            f"{workdir} is in {history.directory}, but the config has {', '.join(places)}; use "
            f"the run's own config, or start a new run with --workdir."
        )


def write_history(workdir: epath.Path, history: RunHistory) -> None:
    """Commits a run's position, atomically."""
    if jax.process_index() == 0:
        text = json.dumps(seal(dataclasses.asdict(history)))
        replace_text(workdir / _FILE, text + "\n")


def after_entering(history: RunHistory, source: Phase | None, phase: Phase) -> RunHistory:
    """Returns the history for a phase without steps yet.

    Args:
      source: The finished previous phase; None for the first phase.
    """
    waypoints = dict(history.waypoints)
    if source is not None:
        waypoints[source.index] = Waypoint(step=source.num_steps, counts=source.end)
    return dataclasses.replace(
        history, phase=phase.index, directory=phase.directory, waypoints=waypoints
    )
