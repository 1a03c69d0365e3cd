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
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import jax
from etils import epath

from stackjax.files.rows_file import AXES, TEXT, Extent, RowsFile
from stackjax.files.storage import is_remote
from stackjax.runtime.errors import UserError

Row = Mapping[str, Any]
Position = tuple[int, int]
"""A point of a run: its phase, and the tokens trained on so far."""

_SECONDS = 5.0
"""Between two appends to `metrics.jsonl`, at least."""


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
    rows: Extent,
    tensorboard: bool,
    wandb_project: str | None,
    settings: Mapping[str, Any],
) -> list[Sink]:
    """Returns the sinks of a run; none in processes other than the first.

    Args:
      directory: The run directory, which may be on `gs://`.
      resume_at: The point that training goes on from; None starts afresh.
      rows: The rows of `metrics.jsonl` up to that point.
      settings: What Weights & Biases shows as the config of the run.
    """
    check_sinks(directory, tensorboard=tensorboard, wandb_project=wandb_project)
    if jax.process_index() != 0:
        return []
    sinks: list[Sink] = [MetricsLog(directory, rows)]
    if tensorboard:
        sinks.append(TensorBoard(directory, resume_at))
    if wandb_project:
        sinks.append(WeightsAndBiases(directory, resume_at, wandb_project, settings))
    return sinks


class MetricsLog:
    """The rows of a run in `metrics.jsonl`.

    Floats keep every bit; those that are not finite become null.

    Args:
      directory: The run directory.
      rows: The rows to keep; those past the point that a run resumes from are written again.
    """

    def __init__(self, directory: epath.PathLike, rows: Extent):
        epath.Path(directory).mkdir(parents=True, exist_ok=True)
        self._file = RowsFile(directory, rows)
        self._pending = b""
        self._next_append = time.monotonic() + _SECONDS

    def write(self, row: Row) -> None:
        """Adds a row; it reaches the file within seconds, or at the next flush."""
        self._pending += _encode(row).encode()
        if time.monotonic() >= self._next_append:
            self._append(is_durable=False)

    def flush(self) -> None:
        """Brings all rows to disk."""
        self._append(is_durable=True)

    def close(self) -> None:
        """Brings all rows to disk."""
        self.flush()

    @property
    def extent(self) -> Extent:
        """The rows that the file holds."""
        return self._file.extent

    def _append(self, *, is_durable: bool) -> None:
        start = time.monotonic()
        self._file.append(self._pending, is_durable=is_durable)
        self._pending = b""
        # Slow disks, and long files in a bucket, are written to less often: 1 % of the time.
        now = time.monotonic()
        self._next_append = now + max(_SECONDS, 100 * (now - start))


def plain_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the values of a row as Python numbers, lists of numbers or None.

    Raises:
      UserError: A value is something else, such as text.
    """
    fetched = jax.device_get(dict(values))
    plain = {
        name: fetched[name].tolist() if hasattr(fetched[name], "tolist") else fetched[name]
        for name in values
    }
    for name, value in plain.items():
        if name not in TEXT and not isinstance(value, int | float | list | None):
            raise UserError(
                f"metric {name} is {value!r}; return a number, an array, a list of numbers or "
                f"None."
            )
    return plain


def flush_all(sinks: Sequence[Sink]) -> Extent:
    """Flushes all sinks, and returns the rows that `metrics.jsonl` holds then.

    It is empty in processes other than the first, which have no sinks.
    """
    for sink in sinks:
        sink.flush()
    logs = [sink for sink in sinks if isinstance(sink, MetricsLog)]
    return logs[0].extent if logs else Extent()


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
        if name not in AXES and isinstance(value, int | float)
    }
