"""States and their descriptions, read from checkpoints; damage is named with a way out."""

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
from stackjax.training.run_position import read_marker
from stackjax.training.train_state import TrainState

T = TypeVar("T")


def read_or_advise(
    checkpoint: epath.Path,
    read: Callable[[epath.Path], T],
    older: Iterable[epath.Path],
    offer: Callable[[epath.Path], str],
    otherwise: str,
) -> T:
    """Returns the result of a function for a checkpoint.

    Args:
      read: Raises DamagedError for a damaged checkpoint.
      older: Checkpoints to offer instead, the newest first.
      offer: Returns the way to such a checkpoint, in words.
      otherwise: The way out if every older checkpoint is damaged.

    Raises:
      UserError: The checkpoint is damaged; the message offers the newest readable one.
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
            # Another process may have found no damage, and takes no part in a search.
            return f"{offer(each)}, the one before it"
        try:
            read(each)
        except DamagedError:
            continue
        return f"{offer(each)}, the newest before it that can be read"
    return otherwise


def _read_beside(checkpoint: epath.Path, read: Callable[[epath.Path], T]) -> T:
    """Returns the result of a function for a checkpoint; after damage offers a neighbor."""
    older = older_checkpoints(checkpoint)
    return read_or_advise(checkpoint, read, older, "name {}".format, "name another checkpoint")


def read_contents(checkpoint: epath.Path) -> Contents:
    """Returns the description in a checkpoint; UserError if it is damaged."""
    return _read_beside(checkpoint, saved_state.read_contents)


def read_types(checkpoint: epath.Path) -> dict[str, str]:
    """Returns the `array_types` of a checkpoint; UserError if it is damaged."""
    return _read_beside(checkpoint, read_array_types)


def load_whole(
    checkpoint: epath.Path, abstract: TrainState, mesh: jax.sharding.Mesh
) -> tuple[TrainState, Contents]:
    """Returns the state in a checkpoint, laid out over `mesh`, and its description.

    The checksum of every array is verified.

    Args:
      abstract: Shapes, types and partitions of the state.

    Raises:
      DamagedError: The checkpoint is damaged.
      UserError: The checkpoint holds another model.
    """
    contents, saved = saved_state.read_contents(checkpoint), read_array_types(checkpoint)
    _check_same_model(checkpoint, saved, array_types(abstract))
    return load_state(checkpoint, saved, abstract, mesh), contents


def load_part(
    checkpoint: epath.Path, abstract: TrainState, mesh: jax.sharding.Mesh
) -> TrainState:
    """Returns a part of the state in a checkpoint, laid out over `mesh`.

    The checksums of these arrays are verified.

    Args:
      abstract: Shapes, types and partitions; the optimizer state may be None.

    Raises:
      UserError: The checkpoint is damaged, or holds other arrays.
    """

    def load(checkpoint: epath.Path) -> TrainState:
        saved, wanted = read_array_types(checkpoint), array_types(abstract)
        _check_same_model(checkpoint, {path: saved.get(path, "") for path in wanted}, wanted)
        return load_state(checkpoint, saved, abstract, mesh)

    return _read_beside(checkpoint, load)


def check_is_model(checkpoint: epath.Path, contents: Contents) -> None:
    """Raises UserError for parameters that no model runs yet."""
    if not contents.is_model:
        raise UserError(
            f"{checkpoint} holds a model that is not done growing: its maps are still being "
            f"fitted, or its masks are not open; name a later checkpoint."
        )


def check_rows_of(workdir: epath.Path) -> None:
    """Raises UserError if rows are missing that a run had at its newest checkpoint."""
    directory = workdir / (read_marker(workdir).directory or "stage_0/train")
    if steps := saved_steps(directory):
        check_rows(workdir, read_contents(directory / str(max(steps))).rows)


def newest_lineage(workdir: epath.Path, source: Phase) -> tuple[Generation, ...]:
    """Returns the lineage in the newest checkpoint of a phase; empty if there is none."""
    step = newest_step(workdir, source)
    if step is None:
        return ()
    return read_contents(workdir / source.directory / str(step)).lineage


def _check_same_model(
    checkpoint: epath.Path, found: dict[str, str], wanted: dict[str, str]
) -> None:
    """Raises UserError if arrays in a checkpoint do not have the types and shapes wanted."""
    differing = sorted(path for path in found | wanted if found.get(path) != wanted.get(path))
    params = [path for path in differing if path.startswith("params.")]
    if differing:
        path, of = (params or differing)[0], "model" if params else "optimizer"
        raise UserError(
            f"{checkpoint} is a checkpoint of another {of}: "
            f"{path.removeprefix('params.')} is {found.get(path) or 'not there'}, and the "
            f"config's {of} has {wanted.get(path, 'none')} ({len(params or differing)} such "
            f"arrays); use the config it was trained with, or another --workdir."
        )
