"""Where a run is: the phase that it is in, and the stages that have ended early."""

import dataclasses
import json
from collections.abc import Mapping

import jax
from etils import epath

from stackjax.phase import Ending, Phase
from stackjax.storage import replace_text

_MARKER = "phase.json"


@dataclasses.dataclass(frozen=True)
class Marker:
    """Where a run is."""

    phase: int = 0
    """The index of the phase that it is in."""
    directory: str = ""
    """Where that phase's checkpoints lie in the run directory; empty for a new run."""
    ended: Mapping[int, Ending] = dataclasses.field(default_factory=dict)
    """The stages that have ended early."""


def read_marker(workdir: epath.Path) -> Marker:
    """Returns where a run is; at its beginning if it is new."""
    path = workdir / _MARKER
    if not path.exists():
        return Marker()
    found = json.loads(path.read_text())
    ended = {int(stage): Ending(**each) for stage, each in found.get("ended", {}).items()}
    return Marker(phase=found["phase"], directory=found["directory"], ended=ended)


def write_marker(workdir: epath.Path, phase: Phase, ended: Mapping[int, Ending]) -> None:
    """Commits that the run is in `phase` now, and that stages have ended; all or nothing."""
    if jax.process_index() == 0:
        endings = {str(stage): dataclasses.asdict(each) for stage, each in ended.items()}
        marker = {"phase": phase.index, "directory": phase.directory, "ended": endings}
        replace_text(workdir / _MARKER, json.dumps(marker) + "\n")
