"""The position of a run: its phase, where earlier phases ended, and which ended early."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import jax
from etils import epath

from stackjax.phase import Change, Counts, Ending, Phase, Waypoint
from stackjax.storage import replace_text

_MARKER = "phase.json"


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
    """Returns the position of a run; the beginning if it is new."""
    path = workdir / _MARKER
    if not path.exists():
        return NEW_RUN
    return marker_from_json(json.loads(path.read_text()))


def marker_from_json(found: Mapping[str, Any]) -> Marker:
    """Returns the marker that `dataclasses.asdict` has made plain."""
    return Marker(
        phase=found["phase"],
        directory=found["directory"],
        ended={int(stage): Ending(**each) for stage, each in found["ended"].items()},
        waypoints={
            int(phase): Waypoint(step=each["step"], counts=Counts(**each["counts"]))
            for phase, each in found["waypoints"].items()
        },
        changes=tuple(
            Change(**{**each, "fields": {k: tuple(v) for k, v in each["fields"].items()}})
            for each in found["changes"]
        ),
    )


def write_marker(workdir: epath.Path, marker: Marker) -> None:
    """Commits the position of a run; all or nothing."""
    if jax.process_index() == 0:
        replace_text(workdir / _MARKER, json.dumps(dataclasses.asdict(marker)) + "\n")


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
