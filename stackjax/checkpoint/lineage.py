"""Where a model comes from: every growth, and all that was spent on the way."""

import dataclasses
import functools
import importlib.metadata
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from stackjax.files.json_file import decode
from stackjax.growth import Growth
from stackjax.model.config import ModelConfig
from stackjax.runtime.errors import UserError
from stackjax.training.phase import Change, Counts, Phase


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generation:
    """A model for as long as it trained as it was."""

    stage: int
    name: Literal["fit", "train"]
    """Whether it trained, or the maps of the growth into it did."""
    growth: str | None
    """How it came out of the generation before; None where it is as before, or the first."""
    model: ModelConfig
    spent: Counts
    """On this generation alone."""
    code: str
    """Version of the code that began it."""
    changes: tuple[str, ...] = ()
    """Changes of its config, and examples skipped, when its run was resumed."""


def begin(lineage: Sequence[Generation], phase: Phase) -> tuple[Generation, ...]:
    """Returns a lineage that goes on with a phase, on which nothing is spent yet."""
    return _append(lineage, phase.stage, phase.name, phase.growth, phase.model)


def begin_grown(
    lineage: Sequence[Generation], growth: Growth, model: ModelConfig
) -> tuple[Generation, ...]:
    """Returns a lineage that goes on with a model that was grown outside of a run."""
    return _append(lineage, lineage[-1].stage + 1, "train", growth, model)


def _append(
    lineage: Sequence[Generation],
    stage: int,
    name: Literal["fit", "train"],
    growth: Growth | None,
    model: ModelConfig,
) -> tuple[Generation, ...]:
    generation = Generation(
        stage=stage,
        name=name,
        growth=None if growth is None else str(growth),
        model=model,
        spent=Counts(),
        code=code_version(),
    )
    return (*lineage, generation)


def spend(
    lineage: Sequence[Generation], phase: Phase, step: int, changes: Sequence[Change] = ()
) -> tuple[Generation, ...]:
    """Returns a lineage whose last generation is a phase at a step.

    Args:
      changes: Those of the run; the ones of the phase up to the step become part of it.
    """
    last = dataclasses.replace(
        lineage[-1],
        spent=phase.counts(step).since(phase.start),
        changes=tuple(
            str(each) for each in changes if each.phase == phase.index and each.step <= step
        ),
    )
    return (*lineage[:-1], last)


def total(lineage: Sequence[Generation]) -> Counts:
    """Returns what was spent on all generations."""
    return functools.reduce(lambda sum_, each: sum_.after(each.spent), lineage, Counts())


def from_json(generations: Any) -> tuple[Generation, ...]:
    """Returns the lineage that `dataclasses.asdict` has made plain.

    Raises:
      UserError: It is none, or empty.
    """
    lineage = decode(tuple[Generation, ...], generations, "lineage")
    if not lineage:
        raise UserError("lineage is empty")
    for generation in lineage:
        if min(dataclasses.astuple(generation.spent)) < 0:
            raise UserError(f"the tokens or FLOPs of stage {generation.stage} are negative")
    return lineage


@functools.cache
def code_version() -> str:
    """Returns the commit of this checkout, with `-dirty` after local changes.

    Outside of a checkout, the installed package's version, or "unknown". Another repository
    around the package, for example around a virtual environment, does not count.
    """
    root = Path(__file__).resolve().parents[2]
    top = _git(root, "rev-parse", "--show-toplevel")
    if top is not None and Path(top).resolve() == root:
        return _git(root, "describe", "--always", "--dirty") or "unknown"
    try:
        return importlib.metadata.version("stackjax")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _git(directory: Path, *arguments: str) -> str | None:
    """Returns the output of a git command; None if git fails or is not installed."""
    command = ["git", "-C", str(directory), *arguments]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()
