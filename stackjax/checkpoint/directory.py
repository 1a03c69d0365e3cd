"""Checkpoint directories: find, list and remove checkpoints."""

import re

import jax
from etils import epath
from jax.experimental import multihost_utils

from stackjax.files.storage import check_bucket, is_remote
from stackjax.runtime.errors import UserError
from stackjax.training.phase import Phase
from stackjax.training.run_history import read_history

_STEP = re.compile("0|[1-9][0-9]*")
_TEMPORARY = ".orbax-checkpoint-tmp"
"""Suffix for incomplete checkpoints; Orbax removes these later."""
_COMMITTED = "commit_success.txt"
"""The last file written to a bucket; a checkpoint without this file is incomplete."""


def absolute(path: str) -> epath.Path:
    """Returns an absolute path, or a `gs://` path, for Orbax.

    Raises:
      UserError: An unsupported bucket, or a missing package.
      OSError: The bucket is missing, or permission is denied.
    """
    if is_remote(path) and not path.startswith("gs://"):
        raise UserError(f"{path}: checkpoints are kept on disks and on gs:// only.")
    check_bucket(path, for_checkpoints=True)
    found = epath.Path(path)
    return found if found.is_absolute() else found.absolute()


def saved_steps(directory: epath.Path) -> list[int]:
    """Returns the steps with a complete checkpoint, in order.

    Only names are read: Orbax would stop at the first damaged checkpoint.
    """
    if not directory.is_dir():
        return []
    named = (path for path in directory.iterdir() if _STEP.fullmatch(path.name))
    return sorted(int(path.name) for path in named if _is_committed(path))


def newest_step(workdir: epath.Path, phase: Phase) -> int | None:
    """Returns a phase's newest step with a complete checkpoint; None without checkpoints."""
    return max(saved_steps(workdir / phase.directory), default=None)


def older_checkpoints(checkpoint: epath.Path) -> list[epath.Path]:
    """Returns earlier checkpoints in the same directory, the newest first."""
    steps = [step for step in saved_steps(checkpoint.parent) if step < int(checkpoint.name)]
    return [checkpoint.parent / str(step) for step in reversed(steps)]


def find_checkpoint(path: epath.Path) -> epath.Path:
    """Returns the newest checkpoint under a path; changes nothing.

    Args:
      path: A run directory, meaning the present phase; a directory with checkpoints; or a
        checkpoint, named by step.
    """
    history, directory = read_history(path), path
    if history.directory:
        directory = path / history.directory
    elif (path / "stage_0").exists():
        directory = path / "stage_0" / "train"
    if steps := saved_steps(directory):
        return directory / str(max(steps))
    if path.name in map(str, saved_steps(path.parent)):
        return path
    raise UserError(
        f"there is no checkpoint in {directory}; name a run directory, a directory of "
        f"checkpoints such as RUN/stage_0/train, or a checkpoint such as "
        f"RUN/stage_0/train/600."
    )


def discard_after(workdir: epath.Path, phase: Phase, step: int) -> None:
    """Removes a phase's checkpoints after a step, the newest first.

    After a kill, each checkpoint is either complete or ignored.
    """
    directory = workdir / phase.directory
    for newer in reversed([each for each in saved_steps(directory) if each > step]):
        _discard(directory / str(newer))


def clear(workdir: epath.Path, phase: Phase) -> None:
    """Removes an uncommitted phase's remains after a kill."""
    directory = workdir / phase.directory
    if jax.process_index() == 0 and directory.exists():
        directory.rmtree()
    multihost_utils.sync_global_devices(f"{directory} is clear")


def _is_committed(checkpoint: epath.Path) -> bool:
    return not is_remote(checkpoint) or (checkpoint / _COMMITTED).exists()


def _discard(checkpoint: epath.Path) -> None:
    if is_remote(checkpoint):
        (checkpoint / _COMMITTED).unlink(missing_ok=True)
    else:
        checkpoint = checkpoint.rename(checkpoint.with_name(checkpoint.name + _TEMPORARY))
    checkpoint.rmtree()
