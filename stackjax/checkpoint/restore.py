"""Restored states and descriptions, with advice for damaged checkpoints."""

from collections.abc import Callable, Iterable
from typing import TypeVar

import jax
from etils import epath

from stackjax.checkpoint import saved_state
from stackjax.checkpoint.contents import Contents
from stackjax.checkpoint.directory import newest_step, older_checkpoints, saved_steps
from stackjax.checkpoint.lineage import Generation
from stackjax.checkpoint.saved_state import (
    DamagedError,
    array_types,
    load_state,
    read_array_types,
)
from stackjax.files.rows_file import check_rows
from stackjax.runtime.errors import UserError
from stackjax.training.phase import Phase
from stackjax.training.run_history import read_history
from stackjax.training.train_state import TrainState

T = TypeVar("T")


def read_or_advise(
    checkpoint: epath.Path,
    read: Callable[[epath.Path], T],
    older: Iterable[epath.Path],
    offer: Callable[[epath.Path], str],
    otherwise: str,
) -> T:
    """Returns `read(checkpoint)`.

    Args:
      read: A function; raises DamagedError for a damaged checkpoint.
      older: Alternative checkpoints, the newest first.
      offer: Returns the advice to use an alternative.
      otherwise: Advice if all alternatives are damaged.

    Raises:
      UserError: The checkpoint is damaged. The message names the newest readable alternative.
    """
    try:
        return read(checkpoint)
    except DamagedError as error:
        raise UserError(f"{error}; {_advice(read, older, offer, otherwise)}.") from error


def _advice(
    read: Callable[[epath.Path], object],
    older: Iterable[epath.Path],
    offer: Callable[[epath.Path], str],
    otherwise: str,
) -> str:
    for each in older:
        if jax.process_count() > 1:
            # Other processes may have found no damage, and would not join a search.
            return f"{offer(each)}, the one before it"
        try:
            read(each)
        except DamagedError:
            continue
        return f"{offer(each)}, the newest before it that can be read"
    return otherwise


def _read_beside(checkpoint: epath.Path, read: Callable[[epath.Path], T]) -> T:
    """Returns `read(checkpoint)`; a UserError names an older checkpoint after damage."""
    older = older_checkpoints(checkpoint)
    return read_or_advise(checkpoint, read, older, "name {}".format, "name another checkpoint")


def read_contents(checkpoint: epath.Path) -> Contents:
    """Returns a checkpoint's description; UserError after damage."""
    return _read_beside(checkpoint, saved_state.read_contents)


def read_types(checkpoint: epath.Path) -> dict[str, str]:
    """Returns a checkpoint's `array_types`; UserError after damage."""
    return _read_beside(checkpoint, read_array_types)


def load_whole(
    checkpoint: epath.Path, abstract: TrainState, mesh: jax.sharding.Mesh
) -> tuple[TrainState, Contents]:
    """Returns a checkpoint's state on `mesh` and description, with verified checksums.

    Args:
      abstract: The state's shapes, types and partitions.

    Raises:
      DamagedError: The checkpoint is damaged.
      UserError: The checkpoint has another model.
    """
    contents, saved = saved_state.read_contents(checkpoint), read_array_types(checkpoint)
    _check_same_model(checkpoint, saved, array_types(abstract))
    return load_state(checkpoint, saved, abstract, mesh), contents


def load_part(
    checkpoint: epath.Path, abstract: TrainState, mesh: jax.sharding.Mesh
) -> TrainState:
    """Returns a part of a checkpoint's state on `mesh`, with verified checksums.

    Args:
      abstract: Shapes, types and partitions; the optimizer state may be None.

    Raises:
      UserError: The checkpoint is damaged, or has other arrays.
    """

    def load(checkpoint: epath.Path) -> TrainState:
        saved, wanted = read_array_types(checkpoint), array_types(abstract)
        _check_same_model(checkpoint, {path: saved.get(path, "") for path in wanted}, wanted)
        return load_state(checkpoint, saved, abstract, mesh)

    return _read_beside(checkpoint, load)


def check_is_model(checkpoint: epath.Path, contents: Contents) -> None:
    """Raises UserError for a checkpoint during a fit, or before masks are open."""
    if not contents.is_model:
        raise UserError(
            f"{checkpoint} holds a model in the middle of growth: during a fit, or with closed "
            f"masks; name a later checkpoint."
        )


def check_rows_of(workdir: epath.Path) -> None:
    """Raises UserError if metric rows up to the newest checkpoint are missing."""
    directory = workdir / (read_history(workdir).directory or "stage_0/train")
    if steps := saved_steps(directory):
        check_rows(workdir, read_contents(directory / str(max(steps))).rows)


def newest_lineage(workdir: epath.Path, source: Phase) -> tuple[Generation, ...]:
    """Returns the lineage in a phase's newest checkpoint; empty without checkpoints."""
    step = newest_step(workdir, source)
    if step is None:
        return ()
    return read_contents(workdir / source.directory / str(step)).lineage


def _check_same_model(
    checkpoint: epath.Path, found: dict[str, str], wanted: dict[str, str]
) -> None:
    """Raises UserError if a checkpoint's arrays differ in type or shape."""
    differing = sorted(path for path in found | wanted if found.get(path) != wanted.get(path))
    params = [path for path in differing if path.startswith("params.")]
    if differing:
        path, of = (params or differing)[0], "model" if params else "optimizer"
        raise UserError(
            f"{checkpoint} is a checkpoint of another {of}: "
            f"{path.removeprefix('params.')} is {found.get(path) or 'not there'}, and the "
            f"config's {of} has {wanted.get(path, 'none')} ({len(params or differing)} such "
            f"arrays); use the checkpoint's own config, or another --workdir."
        )
