"""Checkpoints of each phase, and the marker of the phase that a run is in."""

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from stackjax.config import CheckpointConfig
from stackjax.phases import Counts, Phase
from stackjax.sharding import on_mesh
from stackjax.train_state import TrainState

_MARKER = "phase.json"


def read_marker(workdir: epath.Path) -> int:
    """Returns the index of the phase that a run is in; 0 for a new run."""
    path = workdir / _MARKER
    return json.loads(path.read_text())["phase"] if path.exists() else 0


def write_marker(workdir: epath.Path, phase: Phase) -> None:
    """Commits that the run is in `phase` now; all or nothing."""
    if jax.process_index() == 0:
        replace_text(workdir / _MARKER, json.dumps({"phase": phase.index}) + "\n")


def newest_step(workdir: epath.Path, phase: Phase) -> int | None:
    """Returns the step of the newest whole checkpoint of a phase, touching nothing."""
    directory = workdir / phase.directory
    if not directory.exists():
        return None
    with ocp.training.Checkpointer(directory) as checkpointer:
        return checkpointer.latest.step if checkpointer.latest else None


def replace_text(path: epath.Path, text: str) -> None:
    """Replaces a small file as a whole: readers see the old text or the new."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    temporary.replace(path)


@dataclasses.dataclass(frozen=True)
class _KeepEvery:
    """Keeps the checkpoints that are the first past a multiple of so many tokens."""

    phase: Phase
    keep_every_tokens: int

    def should_preserve(
        self, checkpoints: Sequence[ocp.training.CheckpointMetadata], *, context: Any
    ) -> list[bool]:
        def multiples(step: int) -> int:
            tokens = self.phase.start.after(self.phase.per_step, step).tokens
            return tokens // self.keep_every_tokens

        return [c.step > 0 and multiples(c.step) > multiples(c.step - 1) for c in checkpoints]


class Checkpoints:
    """The checkpoints of one phase, saved in the background; a context manager."""

    def __init__(self, workdir: epath.Path, phase: Phase, config: CheckpointConfig):
        policies = ocp.training.preservation_policies
        keep: Any = policies.LatestN(config.keep_last)
        if config.keep_every_tokens is not None:
            every: Any = _KeepEvery(phase, config.keep_every_tokens)
            keep = policies.AnyPreservationPolicy([keep, every])
        self.directory = workdir / phase.directory
        self._checkpointer = ocp.training.Checkpointer(
            self.directory, preservation_policy=keep, cleanup_tmp_directories=True
        )
        latest = self._checkpointer.latest
        self.latest_step: int | None = None if latest is None else latest.step
        """The step of the newest checkpoint, which may still be on its way to disk."""

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        with _as_os_error(self.directory):
            self._checkpointer.close()

    def save(self, step: int, state: TrainState, counts: Counts) -> None:
        """Starts saving; the state may be donated as soon as this returns.

        Raises:
          OSError: This checkpoint, or the one before it, could not be written.
        """
        if step == self.latest_step:
            return
        metadata = dataclasses.asdict(counts)
        with _as_os_error(self.directory):
            self._checkpointer.save_async(step, state, force=True, custom_metadata=metadata)
        self.latest_step = step

    def wait(self) -> None:
        """Waits until what was saved is whole on disk; OSError if it cannot be."""
        with _as_os_error(self.directory):
            self._checkpointer.wait()

    def restore(
        self, abstract: TrainState, mesh: jax.sharding.Mesh
    ) -> tuple[TrainState, Counts]:
        """Returns the newest state, laid out over `mesh`, and what had been consumed.

        Args:
          abstract: Shapes, types and partitions of the state.

        Raises:
          ValueError: The checkpoint holds parameters of another model.
        """
        latest = self._checkpointer.latest
        assert latest is not None, "restore needs a checkpoint"
        metadata: Any = self._checkpointer.metadata(latest)
        _check_same_model(self.directory, metadata.metadata["params"], abstract.params)
        state = self._checkpointer.load(latest, on_mesh(abstract, mesh))
        return state, Counts(**metadata.custom_metadata)


@contextlib.contextmanager
def _as_os_error(directory: epath.Path) -> Iterator[None]:
    try:
        yield
    except (ValueError, OSError) as error:  # TensorStore raises ValueError on a full disk.
        raise OSError(
            f"a checkpoint could not be written to {directory}: {error}; those before it "
            f"are whole, and the same command resumes from the newest."
        ) from error


def _check_same_model(directory: epath.Path, saved: Any, expected: Any) -> None:
    found, wanted = _shapes(saved), _shapes(expected)
    differing = sorted(path for path in found | wanted if found.get(path) != wanted.get(path))
    if differing:
        path = differing[0]
        raise ValueError(
            f"{directory} holds a checkpoint of another model: {path} is "
            f"{found.get(path, 'not there')}, and the config's model has "
            f"{wanted.get(path, 'none')} ({len(differing)} such parameters); use the "
            f"config it was trained with, or another --workdir."
        )


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): tuple(leaf.shape)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def clear(workdir: epath.Path, phase: Phase) -> None:
    """Removes what a killed run has left of a phase that it did not commit to."""
    directory = workdir / phase.directory
    if jax.process_index() == 0 and directory.exists():
        directory.rmtree()
    multihost_utils.sync_global_devices(f"{directory} is clear")
