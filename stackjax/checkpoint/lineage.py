"""Lineage: all growth steps before a model, with their tokens and FLOPs."""

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
    """A model between two growth steps."""

    stage: int
    name: Literal["fit", "train"]
    """Training, or a fit for a learned growth."""
    growth: str | None
    """Growth from the previous generation; None for the first or an unchanged model."""
    model: ModelConfig
    spent: Counts
    """Consumption in this generation only."""
    code: str
    """Code version at the start."""
    changes: tuple[str, ...] = ()
    """Config changes and skipped examples at resumes."""


def begin(lineage: Sequence[Generation], phase: Phase) -> tuple[Generation, ...]:
    """Returns a lineage with a new phase, without consumption yet."""
    return _append(lineage, phase.stage, phase.name, phase.growth, phase.model)


def begin_grown(
    lineage: Sequence[Generation], growth: Growth, model: ModelConfig
) -> tuple[Generation, ...]:
    """Returns a lineage with a model grown outside a run."""
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
    """Returns a lineage with the last generation at a step.

    Args:
      changes: All changes in the run. Changes in this phase up to the step are recorded.
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
    """Returns the consumption over all generations."""
    return functools.reduce(lambda sum_, each: sum_.after(each.spent), lineage, Counts())


def from_json(generations: Any) -> tuple[Generation, ...]:
    """Returns a lineage from plain values (`dataclasses.asdict`).

    Raises:
      UserError: The lineage is malformed or empty.
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
    """Returns a git command's output; None if git fails or is not installed."""
    command = ["git", "-C", str(directory), *arguments]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()
