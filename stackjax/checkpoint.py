"""Checkpoints of each phase."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import jax
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from stackjax.config import CheckpointConfig
from stackjax.contents import Contents, to_json
from stackjax.errors import UserError
from stackjax.lineage import Generation, begin, spend
from stackjax.marker import read_marker
from stackjax.phase import Change, Counts, Phase
from stackjax.rows_file import NO_ROWS, Extent, check_rows
from stackjax.saved_state import (
    DamagedError,
    array_types,
    load_state,
    read_metadata,
    to_save,
)
from stackjax.storage import check_bucket, is_remote
from stackjax.train_state import TrainState

T = TypeVar("T")

_RESUMES = "those before it are whole, and the same command resumes from the newest"
_TEMPORARY = ".orbax-checkpoint-tmp"
"""Orbax adds this to the name of a checkpoint that is not whole, and later removes it."""
_COMMITTED = "commit_success.txt"
"""The file that makes a checkpoint whole in a bucket."""


def absolute(path: str) -> epath.Path:
    """Returns a path as Orbax wants it: absolute, or in a bucket of Google's.

    Raises:
      UserError: It lies in a bucket of another kind, or a package is not installed.
      OSError: There is no such bucket, or no permission.
    """
    if is_remote(path) and not path.startswith("gs://"):
        raise UserError(f"{path}: checkpoints are kept on disks and on gs:// only.")
    check_bucket(path, for_checkpoints=True)
    found = epath.Path(path)
    return found if found.is_absolute() else found.absolute()


def newest_step(workdir: epath.Path, phase: Phase) -> int | None:
    """Returns the step of the newest whole checkpoint of a phase, touching nothing."""
    return max(_steps(workdir / phase.directory), default=None)


def discard_after(workdir: epath.Path, phase: Phase, step: int) -> None:
    """Removes the checkpoints of a phase that are newer than a step.

    The newest goes first, and none is ever there in part.
    """
    directory = workdir / phase.directory
    for newer in reversed([each for each in _steps(directory) if each > step]):
        _discard(directory / str(newer))


def _steps(directory: epath.Path) -> list[int]:
    """Returns the steps of the committed checkpoints in a directory, in order.

    Orbax would read the metadata of all of them, and stop at a damaged one.
    """
    if not directory.is_dir():
        return []
    named = (path for path in directory.iterdir() if path.name.isdecimal())
    return sorted(int(path.name) for path in named if _is_committed(path))


def _is_committed(checkpoint: epath.Path) -> bool:
    return not is_remote(checkpoint) or (checkpoint / _COMMITTED).exists()


@dataclasses.dataclass(frozen=True)
class _KeepEvery:
    """Keeps the checkpoints that are the first past a multiple of so many tokens."""

    phase: Phase
    keep_every_tokens: int

    def should_preserve(
        self, checkpoints: Sequence[ocp.training.CheckpointMetadata], *, context: Any
    ) -> list[bool]:
        def multiples(step: int) -> int:
            tokens = self.phase.counts(step).tokens
            return tokens // self.keep_every_tokens

        return [c.step > 0 and multiples(c.step) > multiples(c.step - 1) for c in checkpoints]


class Checkpoints:
    """The checkpoints of one phase, saved in the background; a context manager.

    Args:
      workdir: The run directory.
      phase: Whose checkpoints they are.
      config: What is kept.
      lineage: Where the model comes from, where this phase has no checkpoints yet.
      changes: What the user has changed of the run.
    """

    def __init__(
        self,
        workdir: epath.Path,
        phase: Phase,
        config: CheckpointConfig,
        lineage: Sequence[Generation] = (),
        changes: Sequence[Change] = (),
    ):
        self._phase, self._changes = phase, tuple(changes)
        self._config = config
        self._first_lineage = tuple(lineage)
        self.directory = workdir / phase.directory
        self.latest_step: int | None = max(_steps(self.directory), default=None)
        """The step of the newest checkpoint, which may still be on its way to disk."""

    @functools.cached_property
    def _checkpointer(self) -> ocp.training.Checkpointer:
        """What saves, and removes old checkpoints; it reads the metadata of all of them."""
        policies = ocp.training.preservation_policies
        keep: Any = policies.LatestN(self._config.keep_last)
        if self._config.keep_every_tokens is not None:
            every: Any = _KeepEvery(self._phase, self._config.keep_every_tokens)
            keep = policies.AnyPreservationPolicy([keep, every])
        for step in _steps(self.directory):
            try:
                read_metadata(self.directory / str(step))
            except DamagedError as error:
                raise UserError(f"{error}; remove this directory, and start again.") from error
        return ocp.training.Checkpointer(
            self.directory, preservation_policy=keep, cleanup_tmp_directories=True
        )

    @functools.cached_property
    def _lineage(self) -> tuple[Generation, ...]:
        """Where the model of this phase comes from, itself last."""
        if self.latest_step is None:
            return begin(self._first_lineage, self._phase)
        return read_metadata(self.directory / str(self.latest_step))[0].lineage

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def _close(self) -> None:
        if "_checkpointer" in vars(self):
            with _as_os_error(self.directory, _RESUMES):
                vars(self).pop("_checkpointer").close()

    def save(
        self, step: int, state: TrainState, counts: Counts, rows: Extent = NO_ROWS
    ) -> None:
        """Starts saving; the state may be donated as soon as this returns.

        Args:
          rows: The rows of metrics so far, which are on disk.

        Raises:
          OSError: This checkpoint, or the one before it, could not be written.
        """
        if step == self.latest_step:
            return
        lineage = spend(self._lineage, self._phase, step, self._changes)
        model, is_model = self._phase.model, self._phase.trains_model(step)
        metadata = to_json(Contents(counts, model, is_model, lineage, rows))
        checkpointer = self._checkpointer
        with _as_os_error(self.directory, _RESUMES):
            checkpointer.save_async(step, to_save(state), force=True, custom_metadata=metadata)
        self.latest_step = step

    def wait(self) -> None:
        """Waits until what was saved is whole on disk; OSError if it cannot be."""
        with _as_os_error(self.directory, _RESUMES):
            self._checkpointer.wait()

    def restore(
        self, abstract: TrainState, mesh: jax.sharding.Mesh, step: int | None = None
    ) -> tuple[TrainState, Contents]:
        """Returns a state, laid out over `mesh`, and what its checkpoint says of it.

        The checksum of every array is verified.

        Args:
          abstract: Shapes, types and partitions of the state.
          step: The newest by default.

        Raises:
          UserError: There is no such checkpoint, or it holds another model, or it is damaged;
            the message names the newest whole one.
        """
        step = self.latest_step if step is None else step
        if step not in _steps(self.directory):
            raise UserError(
                f"{self.directory} has no checkpoint of step {step}; it has those of steps "
                f"{', '.join(map(str, _steps(self.directory))) or 'none'}."
            )
        try:
            found = self._load(step, abstract, mesh)
        except DamagedError as error:
            raise UserError(f"{error}; {self._way_out(step, abstract, mesh)}.") from error
        if step == self.latest_step:
            # An older one that is damaged is named now, and not at the first save.
            _ = self._checkpointer
        return found

    def newest_whole_step(
        self, abstract: TrainState, mesh: jax.sharding.Mesh, below: int
    ) -> int | None:
        """Returns the step of the newest checkpoint before a step that is not damaged."""
        for step in sorted(
            (step for step in _steps(self.directory) if step < below), reverse=True
        ):
            with contextlib.suppress(DamagedError):
                self._load(step, abstract, mesh)
                return step
        return None

    def _load(
        self, step: int, abstract: TrainState, mesh: jax.sharding.Mesh
    ) -> tuple[TrainState, Contents]:
        checkpoint = self.directory / str(step)
        contents, saved = read_metadata(checkpoint)
        _check_same_model(self.directory, saved, array_types(abstract))
        return load_state(checkpoint, saved, abstract, mesh), contents

    def _way_out(self, step: int, abstract: TrainState, mesh: jax.sharding.Mesh) -> str:
        """Returns what can be done about a damaged checkpoint."""
        older = [each for each in _steps(self.directory) if each < step]
        stage = self._phase.stage
        if jax.process_count() > 1 and older:
            # Another process may have found no damage, and does not take part in a search.
            return f"the one before it is step {max(older)}: add --resume-from {max(older)}"
        whole = self.newest_whole_step(abstract, mesh, step)
        if whole is None:
            return (
                f"no older checkpoint of stage {stage} is whole: start a new run with "
                f"--workdir, from another checkpoint with --init-from"
            )
        return (
            f"the newest whole checkpoint is step {whole} of stage {stage}: add "
            f"--resume-from {whole}"
        )


def find_checkpoint(path: epath.Path) -> epath.Path:
    """Returns the newest checkpoint that a path names, touching nothing.

    Args:
      path: A run, which means the phase that it is in; a directory of checkpoints; or one
        checkpoint, which is named by its step.
    """
    marker, directory = read_marker(path), path
    if marker.directory:
        directory = path / marker.directory
    elif (path / "stage_0").exists():
        directory = path / "stage_0" / "train"
    if steps := _steps(directory):
        return directory / str(max(steps))
    if path.name.isdecimal() and int(path.name) in _steps(path.parent):
        return path
    raise UserError(
        f"there is no checkpoint in {directory}; name a run directory, a directory of "
        f"checkpoints such as RUN/stage_0/train, or a checkpoint such as "
        f"RUN/stage_0/train/600."
    )


def read_contents(checkpoint: epath.Path) -> tuple[Contents, dict[str, str]]:
    """Returns what a checkpoint says of its state, and its `array_types`.

    Raises:
      UserError: It is damaged; the message names one that is not.
    """
    return _or_older(checkpoint, read_metadata)


def check_is_model(checkpoint: epath.Path, contents: Contents) -> None:
    """Raises UserError where parameters are not yet those that a model runs."""
    if not contents.is_model:
        raise UserError(
            f"{checkpoint} holds a model that is not done growing: its maps are still being "
            f"fitted, or its masks are not open; name a later checkpoint."
        )


def newest_lineage(workdir: epath.Path, source: Phase) -> tuple[Generation, ...]:
    """Returns the lineage at the newest checkpoint of a phase; none where it has none."""
    step = newest_step(workdir, source)
    if step is None:
        return ()
    return read_metadata(workdir / source.directory / str(step))[0].lineage


def load_part(
    checkpoint: epath.Path, abstract: TrainState, mesh: jax.sharding.Mesh
) -> TrainState:
    """Returns a part of the state in a checkpoint, laid out over `mesh`.

    The checksums of its arrays are verified.

    Args:
      abstract: Shapes, types and partitions of the part; its optimizer state may be None.

    Raises:
      UserError: It is damaged, or holds other arrays.
    """

    def load(checkpoint: epath.Path) -> TrainState:
        _, saved = read_metadata(checkpoint)
        wanted = array_types(abstract)
        _check_same_model(checkpoint, {path: saved.get(path, "") for path in wanted}, wanted)
        return load_state(checkpoint, saved, abstract, mesh)

    return _or_older(checkpoint, load)


def _or_older(checkpoint: epath.Path, read: Callable[[epath.Path], T]) -> T:
    """Returns what a function reads of a checkpoint; names an older one if it cannot."""
    try:
        return read(checkpoint)
    except DamagedError as error:
        raise UserError(f"{error}; {_older(checkpoint, read)}.") from error


def _older(checkpoint: epath.Path, read: Callable[[epath.Path], Any]) -> str:
    """Returns which older checkpoint can be read instead of a damaged one, in words."""
    # Another of several processes may have found no damage, and takes no part in a search.
    steps = _steps(checkpoint.parent) if jax.process_count() == 1 else []
    for step in reversed([each for each in steps if each < int(checkpoint.name)]):
        with contextlib.suppress(DamagedError):
            read(checkpoint.parent / str(step))
            return f"the newest whole checkpoint beside it is that of step {step}: name that"
    return "name another checkpoint"


def write_first(directory: epath.Path, state: TrainState, contents: Contents) -> epath.Path:
    """Writes a state as the first checkpoint of a directory, whole or not at all.

    Raises:
      OSError: It could not be written.
    """
    with (
        _as_os_error(directory, "nothing there is whole"),
        ocp.training.Checkpointer(directory) as checkpointer,
    ):
        checkpointer.save(0, to_save(state), force=True, custom_metadata=to_json(contents))
    return directory / "0"


@contextlib.contextmanager
def _as_os_error(directory: epath.Path, what_is_left: str) -> Iterator[None]:
    try:
        yield
    except (ValueError, OSError) as error:  # TensorStore raises ValueError on a full disk.
        raise OSError(
            f"a checkpoint could not be written to {directory}: {error}; {what_is_left}."
        ) from error


def _check_same_model(
    directory: epath.Path, found: dict[str, str], wanted: dict[str, str]
) -> None:
    """Raises UserError if arrays of a checkpoint have other types or shapes than a model's."""
    differing = sorted(path for path in found | wanted if found.get(path) != wanted.get(path))
    params = [path for path in differing if path.startswith("params.")]
    if differing:
        path, of = (params or differing)[0], "model" if params else "optimizer"
        raise UserError(
            f"{directory} holds a checkpoint of another {of}: "
            f"{path.removeprefix('params.')} is {found.get(path) or 'not there'}, and the "
            f"config's {of} has {wanted.get(path, 'none')} ({len(params or differing)} such "
            f"arrays); use the config it was trained with, or another --workdir."
        )


def check_rows_of(workdir: epath.Path) -> None:
    """Raises UserError if rows are missing that a run had at its newest checkpoint."""
    directory = workdir / (read_marker(workdir).directory or "stage_0/train")
    if steps := _steps(directory):
        contents, _ = read_metadata(directory / str(max(steps)))
        check_rows(workdir, contents.rows)


def _discard(checkpoint: epath.Path) -> None:
    """Removes a checkpoint; killed at any time, it is there whole or counts as none."""
    if is_remote(checkpoint):
        (checkpoint / _COMMITTED).unlink(missing_ok=True)
    else:
        checkpoint = checkpoint.rename(checkpoint.with_name(checkpoint.name + _TEMPORARY))
    checkpoint.rmtree()


def clear(workdir: epath.Path, phase: Phase) -> None:
    """Removes what a killed run has left of a phase that it did not commit to."""
    directory = workdir / phase.directory
    if jax.process_index() == 0 and directory.exists():
        directory.rmtree()
    multihost_utils.sync_global_devices(f"{directory} is clear")
