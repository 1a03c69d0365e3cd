"""Where a run is: the phase that it is in, and the stages that have ended early."""

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence

import jax
from etils import epath

from stackjax.errors import UserError
from stackjax.phase import Ending, Phase
from stackjax.runtime.json_file import Fields, decode, read_object, seal, unseal
from stackjax.storage import replace_text

_MARKER = "phase.json"
_DIRECTORY = re.compile(r"stage_\d+/(fit|train)")
_WAY_OUT = (
    "bring phase.json back from a copy of the run, or start a new run with --workdir, from a "
    "checkpoint of this one with --init-from"
)


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
    """Returns where a run is; at its beginning if it is new.

    Raises:
      UserError: The file is damaged, or is gone from a run that has come past its first stage.
    """
    path = workdir / _MARKER
    if not path.exists():
        if (workdir / "stage_1").exists():
            raise UserError(f"{workdir} has a stage_1, but no phase.json; {_WAY_OUT}.")
        return Marker()
    return read_object(path, _WAY_OUT, _from_fields)


def _from_fields(fields: Fields) -> Marker:
    marker = decode(Marker, unseal(fields), "marker")
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


def write_marker(workdir: epath.Path, phase: Phase, ended: Mapping[int, Ending]) -> None:
    """Commits that the run is in `phase` now, and that stages have ended; all or nothing."""
    if jax.process_index() == 0:
        endings = {str(stage): dataclasses.asdict(each) for stage, each in ended.items()}
        marker = {"phase": phase.index, "directory": phase.directory, "ended": endings}
        replace_text(workdir / _MARKER, json.dumps(seal(marker)) + "\n")
