"""Where numbers go: `metrics.jsonl`, TensorBoard, Weights & Biases.

A row is a plain dict. `kind` ("train", "evaluation", "growth", "probe", "tasks", "trigger" or
"layers"), `phase`, `stage`, `step` and `tokens` say what and when, and the rest are numbers (or
short text), or lists of them, which go into the file alone. Rows of layers carry what
`layer_statistics` returns, a number for each layer, and at a growth the same `_before` it. Rows
of training carry `loss`, `learning_rate`, `grad_norm`, `tokens_per_second` of all of
`num_devices`, cumulative `flops`, and `mfu` where the peak of the devices is known.
"""

import importlib
import importlib.util
import json
import math
import os
import time
import uuid
from collections.abc import Mapping
from typing import Any, Protocol

import jax
from etils import epath

from stackjax.errors import UserError
from stackjax.storage import is_remote

Row = Mapping[str, Any]
Position = tuple[int, int]
"""A point of a run: its phase, and the tokens trained on so far."""

_AXES = ("kind", "phase", "stage", "step", "tokens")


class Sink(Protocol):
    """Somewhere that rows are written to."""

    def write(self, row: Row) -> None:
        """Takes one row; it may be kept in memory for some seconds."""

    def flush(self) -> None:
        """Puts all rows so far where they outlive this process."""

    def close(self) -> None:
        """Flushes, and frees what is held; nothing is written afterwards."""


def check_sinks(
    directory: epath.PathLike, *, tensorboard: bool, wandb_project: str | None
) -> None:
    """Raises UserError if a package that the sinks need is not installed."""
    # W&B leaves a folder of its name behind, which Python would take for the package.
    package = importlib.util.find_spec("wandb")
    if wandb_project and (package is None or package.origin is None):
        raise UserError(
            f"logging.wandb_project is {wandb_project!r}, but Weights & Biases is not "
            "installed; `pip install wandb`, or leave it out."
        )
    if tensorboard and is_remote(directory) and not _tensorboardX().record_writer.GCS_ENABLED:
        raise UserError(
            f"logging.tensorboard is on and the run directory is {directory}, which "
            "needs `pip install google-cloud-storage`; or turn it off."
        )


def open_sinks(
    directory: epath.PathLike,
    resume_at: Position | None,
    *,
    tensorboard: bool,
    wandb_project: str | None,
    settings: Mapping[str, Any],
) -> list[Sink]:
    """Returns the sinks of a run; none in processes other than the first.

    Args:
      directory: The run directory, which may be on `gs://`.
      resume_at: The point that training goes on from; None starts afresh.
      settings: What Weights & Biases shows as the config of the run.
    """
    check_sinks(directory, tensorboard=tensorboard, wandb_project=wandb_project)
    if jax.process_index() != 0:
        return []
    sinks: list[Sink] = [MetricsLog(directory, resume_at)]
    if tensorboard:
        sinks.append(TensorBoard(directory, resume_at))
    if wandb_project:
        sinks.append(WeightsAndBiases(directory, resume_at, wandb_project, settings))
    return sinks


def read_rows(directory: epath.PathLike) -> list[dict[str, Any]]:
    """Returns the rows of `metrics.jsonl` in a run directory; none if there is no file.

    A last line that was only half written is left out; other damage is a UserError.
    """
    path = epath.Path(directory) / "metrics.jsonl"
    lines = path.read_bytes().splitlines() if path.exists() else []
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            if number < len(lines):
                raise UserError(
                    f"{path} is damaged at line {number} ({error}); mend or move it."
                ) from error
    return rows


class MetricsLog:
    """The rows of a run in `metrics.jsonl`, replaced as a whole, so it is never torn.

    Rows past the point that a run resumes from are forgotten: they are written again.
    Floats keep every bit; those that are not finite become null.
    """

    def __init__(self, directory: epath.PathLike, resume_at: Position | None):
        self._path = epath.Path(directory) / "metrics.jsonl"
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._lines = [
            _encode(row)
            for row in read_rows(directory)
            if resume_at is not None and (row["phase"], row["tokens"]) <= resume_at
        ]
        self._next_replacement = 0.0
        self._replace()

    def write(self, row: Row) -> None:
        """Adds a row; it reaches the file within seconds, or at the next flush."""
        self._lines.append(_encode(row))
        self._is_stale = True
        if time.monotonic() >= self._next_replacement:
            self._replace()

    def flush(self) -> None:
        """Brings the file up to date."""
        if self._is_stale:
            self._replace()

    def close(self) -> None:
        """Brings the file up to date."""
        self.flush()

    def _replace(self) -> None:
        start = time.monotonic()
        text = "".join(self._lines)
        if is_remote(self._path):
            self._path.write_text(text)  # an object appears whole or not at all
        else:
            temporary = self._path.with_name("metrics.jsonl.tmp")
            with temporary.open("w") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(self._path)
        self._is_stale = False
        # Long files and slow disks are replaced less often: 1 % of the time at most.
        now = time.monotonic()
        self._next_replacement = now + max(5.0, 100 * (now - start))


def _tensorboardX() -> Any:
    """Returns the package, which imports PyTorch where that is installed: for two seconds."""
    return importlib.import_module("tensorboardX")


class TensorBoard:
    """TensorBoard events in `tensorboard/`, over tokens; a restart hides stale ones."""

    def __init__(self, directory: epath.PathLike, resume_at: Position | None):
        self._writer = _tensorboardX().SummaryWriter(
            os.fspath(epath.Path(directory) / "tensorboard"),
            purge_step=0 if resume_at is None else resume_at[1] + 1,
            max_queue=1000,  # so that a slow disk does not hold up training
        )

    def write(self, row: Row) -> None:
        """Queues the numbers of a row."""
        for name, value in _numbers(row).items():
            self._writer.add_scalar(name, value, row["tokens"])

    def flush(self) -> None:
        """Writes out the events that have left the queue."""
        self._writer.flush()

    def close(self) -> None:
        """Writes out all events."""
        self._writer.close()


class WeightsAndBiases:
    """A Weights & Biases run over tokens, which a resumed run continues.

    Its id lies in the run directory: one that is moved keeps it, one that is started
    afresh gets another. The client drops rows that a resumed run repeats, because
    it only takes steps that grow.
    """

    def __init__(
        self,
        directory: epath.PathLike,
        resume_at: Position | None,
        project: str,
        settings: Mapping[str, Any],
    ):
        path = epath.Path(directory) / "wandb_id.txt"
        if resume_at is None or not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(uuid.uuid4().hex)
        self._run = importlib.import_module("wandb").init(
            project=project,
            id=path.read_text(),
            name=path.parent.name,
            dir=None if is_remote(path) else os.fspath(path.parent),
            config=dict(settings),
            resume="allow",
        )

    def write(self, row: Row) -> None:
        """Queues the numbers of a row."""
        self._run.log(_numbers(row), step=row["tokens"])

    def flush(self) -> None:
        """Does nothing: rows are uploaded as they come."""

    def close(self) -> None:
        """Uploads what is left."""
        self._run.finish()


def _encode(row: Row) -> str:
    return json.dumps({name: _finite(value) for name, value in row.items()}) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _numbers(row: Row) -> dict[str, float]:
    """Returns the numbers of a row that are no coordinates, named after its kind."""
    return {
        f"{row['kind']}/{name}": value
        for name, value in row.items()
        if name not in _AXES and isinstance(value, int | float)
    }
