"""Checkpoints of each phase."""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from stackjax.config import CheckpointConfig
from stackjax.errors import UserError
from stackjax.lineage import Generation, begin, from_json, spend
from stackjax.marker import read_marker
from stackjax.model.config import ModelConfig, model_from_json
from stackjax.phase import Change, Counts, Phase
from stackjax.sharding import on_mesh
from stackjax.storage import check_bucket, is_remote
from stackjax.train_state import TrainState

_RESUMES = "those before it are whole, and the same command resumes from the newest"


@dataclasses.dataclass(frozen=True)
class Contents:
    """What a checkpoint says of the state that it holds."""

    counts: Counts
    """What had been consumed."""
    model: ModelConfig
    is_model: bool
    """Whether the parameters are those that the model runs: not while a learned growth is
    fitted, and not until all masks are open."""
    lineage: tuple[Generation, ...]
    """Where the model comes from, itself last."""


def absolute(path: str) -> epath.Path:
    """Returns a path as Orbax wants it: absolute, or in a bucket of Google's.

    Raises:
      UserError: It lies in a bucket of another kind, or a package is not installed.
      OSError: There is no such bucket, or no permission.
    """
    found = epath.Path(path)
    if is_remote(path) and not path.startswith("gs://"):
        raise UserError(f"{path}: checkpoints are kept on disks and on gs:// only.")
    check_bucket(path, for_checkpoints=True)
    return found if found.is_absolute() else found.absolute()


def newest_step(workdir: epath.Path, phase: Phase) -> int | None:
    """Returns the step of the newest whole checkpoint of a phase, touching nothing."""
    return max(_steps(workdir / phase.directory), default=None)


def discard_after(workdir: epath.Path, phase: Phase, step: int) -> None:
    """Removes the checkpoints of a phase that are newer than a step."""
    for newer in sorted(_steps(workdir / phase.directory), reverse=True):
        if newer > step:
            (workdir / phase.directory / str(newer)).rmtree()


def _steps(directory: epath.Path) -> list[int]:
    """Returns the steps of the whole checkpoints in a directory."""
    if not directory.exists():
        return []
    with ocp.training.Checkpointer(directory) as checkpointer:
        return [checkpoint.step for checkpoint in checkpointer.checkpoints]


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
        policies = ocp.training.preservation_policies
        keep: Any = policies.LatestN(config.keep_last)
        if config.keep_every_tokens is not None:
            every: Any = _KeepEvery(phase, config.keep_every_tokens)
            keep = policies.AnyPreservationPolicy([keep, every])
        self._phase, self._changes = phase, changes
        self.directory = workdir / phase.directory
        self._checkpointer = ocp.training.Checkpointer(
            self.directory, preservation_policy=keep, cleanup_tmp_directories=True
        )
        latest = self._checkpointer.latest
        self.latest_step: int | None = None if latest is None else latest.step
        """The step of the newest checkpoint, which may still be on its way to disk."""
        if latest is not None:
            metadata = self._checkpointer.metadata(latest)
            self._lineage = _read_contents(self.directory, metadata).lineage
        else:
            self._lineage = begin(lineage, phase)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        with _as_os_error(self.directory, _RESUMES):
            self._checkpointer.close()

    def save(self, step: int, state: TrainState, counts: Counts) -> None:
        """Starts saving; the state may be donated as soon as this returns.

        Raises:
          OSError: This checkpoint, or the one before it, could not be written.
        """
        if step == self.latest_step:
            return
        lineage = spend(self._lineage, self._phase, step, self._changes)
        model, is_model = self._phase.model, self._phase.trains_model(step)
        contents = Contents(counts, model, is_model, lineage)
        metadata = dataclasses.asdict(contents)
        with _as_os_error(self.directory, _RESUMES):
            self._checkpointer.save_async(step, state, force=True, custom_metadata=metadata)
        self.latest_step = step

    def wait(self) -> None:
        """Waits until what was saved is whole on disk; OSError if it cannot be."""
        with _as_os_error(self.directory, _RESUMES):
            self._checkpointer.wait()

    def restore(
        self, abstract: TrainState, mesh: jax.sharding.Mesh, step: int
    ) -> tuple[TrainState, Contents]:
        """Returns the state of a step, laid out over `mesh`, and what its checkpoint says.

        Args:
          abstract: Shapes, types and partitions of the state.

        Raises:
          UserError: The checkpoint holds parameters of another model.
        """
        metadata: Any = self._checkpointer.metadata(step)
        _check_same_model(self.directory, metadata.metadata["params"], abstract.params)
        state = self._checkpointer.load(step, on_mesh(abstract, mesh))
        return state, _read_contents(self.directory, metadata)


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
    """Returns what a checkpoint says of its state, and its `array_types`."""
    metadata: Any = ocp.metadata(checkpoint)
    return _read_contents(checkpoint, metadata), array_types(metadata.metadata)


def check_is_model(checkpoint: epath.Path, contents: Contents) -> None:
    """Raises UserError where parameters are not yet those that a model runs."""
    if not contents.is_model:
        raise UserError(
            f"{checkpoint} holds a model that is not done growing: its maps are still being "
            f"fitted, or its masks are not open; name a later checkpoint."
        )


def _read_contents(checkpoint: epath.Path, metadata: Any) -> Contents:
    fields = metadata.custom_metadata or {}
    if not {field.name for field in dataclasses.fields(Contents)} <= fields.keys():
        raise UserError(
            f"{checkpoint} does not say which model it holds, and where that comes from; name "
            f"a checkpoint that this version of stackjax.train or stackjax.grow has written."
        )
    return Contents(
        counts=Counts(**fields["counts"]),
        model=model_from_json(fields["model"]),
        is_model=fields["is_model"],
        lineage=from_json(fields["lineage"]),
    )


def newest_lineage(workdir: epath.Path, source: Phase) -> tuple[Generation, ...]:
    """Returns the lineage at the newest checkpoint of a phase; none where it has none."""
    step = newest_step(workdir, source)
    if step is None:
        return ()
    return read_contents(workdir / source.directory / str(step))[0].lineage


def load_part(
    checkpoint: epath.Path, abstract: TrainState, mesh: jax.sharding.Mesh
) -> TrainState:
    """Returns a part of the state in a checkpoint, laid out over `mesh`.

    Args:
      abstract: Shapes, types and partitions of the part; its optimizer state may be None.
    """
    tree: Any = abstract
    if abstract.opt_state is None:
        tree = {"step": abstract.step, "params": abstract.params}
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    with context:
        loaded: Any = ocp.load(checkpoint, on_mesh(tree, mesh))
    return TrainState(**loaded, opt_state=None) if isinstance(loaded, dict) else loaded


def write_first(directory: epath.Path, state: TrainState, contents: Contents) -> epath.Path:
    """Writes a state as the first checkpoint of a directory, whole or not at all.

    Raises:
      OSError: It could not be written.
    """
    with (
        _as_os_error(directory, "nothing there is whole"),
        ocp.training.Checkpointer(directory) as checkpointer,
    ):
        checkpointer.save(0, state, force=True, custom_metadata=dataclasses.asdict(contents))
    return directory / "0"


@contextlib.contextmanager
def _as_os_error(directory: epath.Path, what_is_left: str) -> Iterator[None]:
    try:
        yield
    except (ValueError, OSError) as error:  # TensorStore raises ValueError on a full disk.
        raise OSError(
            f"a checkpoint could not be written to {directory}: {error}; {what_is_left}."
        ) from error


def _check_same_model(directory: epath.Path, saved: Any, expected: Any) -> None:
    found, wanted = array_types(saved), array_types(expected)
    differing = sorted(path for path in found | wanted if found.get(path) != wanted.get(path))
    if differing:
        path = differing[0]
        raise UserError(
            f"{directory} holds a checkpoint of another model: {path} is "
            f"{found.get(path, 'not there')}, and the config's model has "
            f"{wanted.get(path, 'none')} ({len(differing)} such parameters); use the "
            f"config it was trained with, or another --workdir."
        )


def array_types(tree: Any) -> dict[str, str]:
    """Returns type and shape of every array of a tree, such as `float32[64, 256]`.

    By its path, such as `params.head`.
    """
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): f"{leaf.dtype}{[*leaf.shape]}"
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def clear(workdir: epath.Path, phase: Phase) -> None:
    """Removes what a killed run has left of a phase that it did not commit to."""
    directory = workdir / phase.directory
    if jax.process_index() == 0 and directory.exists():
        directory.rmtree()
    multihost_utils.sync_global_devices(f"{directory} is clear")
