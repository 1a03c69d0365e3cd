"""The position of a run: its phase, where earlier phases ended, and which ended early."""

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence

import jax
from etils import epath

from stackjax.files.json_file import Fields, decode, read_object, seal, unseal
from stackjax.files.storage import replace_text
from stackjax.runtime.errors import UserError
from stackjax.training.phase import Change, Ending, Phase, Waypoint

_MARKER = "phase.json"
_DIRECTORY = re.compile(r"stage_\d+/(fit|train)")
_WAY_OUT = (
    "bring phase.json back from a copy of the run, or start a new run with --workdir, from a "
    "checkpoint of this one with --init-from"
)


@dataclasses.dataclass(frozen=True)
class Marker:
    """The position of a run, and how it came there."""

    phase: int = 0
    """The index of the present phase."""
    directory: str = ""
    """Checkpoints of the present phase, in the run directory; empty for a new run."""
    ended: Mapping[int, Ending] = dataclasses.field(default_factory=dict)
    """The stages that have ended early."""
    waypoints: Mapping[int, Waypoint] = dataclasses.field(default_factory=dict)
    """By the index of a phase: the end of an earlier phase, and the newest step of the present
    one where a resumed run has changed the config or skipped examples."""
    changes: tuple[Change, ...] = ()
    """Every such change, the newest last."""


NEW_RUN = Marker()


def read_marker(workdir: epath.Path) -> Marker:
    """Returns the position of a run; the beginning if it is new.

    Raises:
      UserError: The file is damaged, or is gone from a run that has come past its first stage.
    """
    path = workdir / _MARKER
    if not path.exists():
        if (workdir / "stage_1").exists():
            raise UserError(f"{workdir} has a stage_1, but no phase.json; {_WAY_OUT}.")
        return NEW_RUN
    return read_object(path, _WAY_OUT, _from_fields)


def _from_fields(fields: Fields) -> Marker:
    marker = decode(Marker, unseal(fields))
    if not _DIRECTORY.fullmatch(marker.directory):
        raise UserError(f"directory {marker.directory!r} is not that of a phase")
    return marker


def check_phase(workdir: epath.Path, marker: Marker, phases: Sequence[Phase]) -> None:
    """Raises UserError if a run is in a phase that its config does not have."""
    places = [phase.directory for phase in phases]
    if marker.directory and places[marker.phase : marker.phase + 1] != [marker.directory]:
        raise UserError(
            f"{workdir} is in {marker.directory}, but the config has {', '.join(places)}; take "
            f"the config that it was started with, or start a new run with --workdir."
        )


def write_marker(workdir: epath.Path, marker: Marker) -> None:
    """Commits the position of a run; all or nothing."""
    if jax.process_index() == 0:
        text = json.dumps(seal(dataclasses.asdict(marker)))
        replace_text(workdir / _MARKER, text + "\n")


def after_entering(marker: Marker, source: Phase | None, phase: Phase) -> Marker:
    """Returns the marker of a run that goes on with a phase.

    Args:
      source: The phase before, which has ended; None for the first.
    """
    waypoints = dict(marker.waypoints)
    if source is not None:
        waypoints[source.index] = Waypoint(step=source.num_steps, counts=source.end)
    return dataclasses.replace(
        marker, phase=phase.index, directory=phase.directory, waypoints=waypoints
    )
