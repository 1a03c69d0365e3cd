"""Metric sinks: `metrics.jsonl`, TensorBoard, Weights & Biases.

A row is a dict with the coordinates `kind`, `phase`, `stage`, `step` and `tokens`, the run's
cumulative counts, and values: numbers, lists of numbers, or short text. Lists and text are
written to `metrics.jsonl` alone. The kinds are "train", "evaluation", "layers", "growth",
"probe", "tasks", "trigger", "change", "goodput", "spike", "late", and the hooks'
kinds.

Train rows have all metrics from `train_step`, `tokens_per_second` over all `num_devices`, and
`mfu` if the peak FLOP/s is known. Layer rows have the lists from `layer_statistics`; at
growth, lists named `_before` describe the source.
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

from stackjax.config import Config, LoggingConfig
from stackjax.config_file import flatten
from stackjax.files.rows_file import AXES, TEXT, Extent, RowsFile
from stackjax.files.storage import is_remote
from stackjax.runtime.errors import UserError

Row = Mapping[str, Any]
Position = tuple[int, int]
"""A point in a run: phase index and tokens."""

_SECONDS = 5.0
"""Least time between two appends to `metrics.jsonl`."""


class Sink(Protocol):
    """A destination for rows."""

    def write(self, row: Row) -> None:
        """Takes one row, and may keep the row in memory for some seconds."""

    def flush(self) -> None:
        """Stores all rows durably."""

    def close(self) -> None:
        """Flushes and releases all resources."""


def check_sinks(config: LoggingConfig, directory: epath.PathLike) -> None:
    """Raises UserError if a package that the sinks need is not installed."""
    # Python would take a folder named wandb for the package.
    package = importlib.util.find_spec("wandb")
    if config.wandb_project and (package is None or package.origin is None):
        raise UserError(
            f"logging.wandb_project is {config.wandb_project!r}, but Weights & Biases is not "
            "installed; `pip install wandb`, or leave it out."
        )
    in_bucket = config.tensorboard and is_remote(directory)
    if in_bucket and not _tensorboardX().record_writer.GCS_ENABLED:
        raise UserError(
            f"logging.tensorboard is on and the run directory is {directory}, which "
            "needs `pip install google-cloud-storage`; or turn it off."
        )


def open_sinks(
    config: Config, directory: epath.PathLike, resume_at: Position | None, rows: Extent
) -> list[Sink]:
    """Returns the run's sinks in process 0, and no sinks in other processes.

    Args:
      directory: The run directory, on a disk or `gs://`.
      resume_at: The start position; None for a new run.
      rows: The extent up to the start position.
    """
    if jax.process_index() != 0:
        return []
    sinks: list[Sink] = [MetricsLog(directory, rows)]
    if config.logging.tensorboard:
        sinks.append(TensorBoard(directory, resume_at))
    if project := config.logging.wandb_project:
        sinks.append(WeightsAndBiases(directory, resume_at, project, flatten(config)))
    return sinks


class MetricsLog:
    """A run's rows in `metrics.jsonl`.

    Finite floats keep every bit. Infinity and NaN become null.

    Args:
      directory: The run directory.
      rows: The extent to keep; later rows are removed.
    """

    def __init__(self, directory: epath.PathLike, rows: Extent):
        epath.Path(directory).mkdir(parents=True, exist_ok=True)
        self._file = RowsFile(directory, rows)
        self._pending = b""
        self._next_append = time.monotonic() + _SECONDS

    def write(self, row: Row) -> None:
        """Adds a row. The row is in the file within seconds, or after the next flush."""
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
        # Appending takes at most 1 % of the time, also on slow disks and in buckets.
        now = time.monotonic()
        self._next_append = now + max(_SECONDS, 100 * (now - start))


def plain_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a row's values as Python numbers, lists or None.

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
    """Flushes all sinks and returns the extent in `metrics.jsonl`; empty without sinks."""
    for sink in sinks:
        sink.flush()
    logs = [sink for sink in sinks if isinstance(sink, MetricsLog)]
    return logs[0].extent if logs else Extent()


def _tensorboardX() -> Any:
    """Returns tensorboardX, imported late: if PyTorch is installed, the import takes 2 s."""
    return importlib.import_module("tensorboardX")


class TensorBoard:
    """TensorBoard events in `tensorboard/`, over tokens. A restart hides stale events."""

    def __init__(self, directory: epath.PathLike, resume_at: Position | None):
        self._writer = _tensorboardX().SummaryWriter(
            os.fspath(epath.Path(directory) / "tensorboard"),
            purge_step=0 if resume_at is None else resume_at[1] + 1,
            max_queue=1000,  # a slow disk must not slow down training
        )

    def write(self, row: Row) -> None:
        """Queues a row's numbers."""
        for name, value in _numbers(row).items():
            self._writer.add_scalar(name, value, row["tokens"])

    def flush(self) -> None:
        """Writes the events that have left the queue."""
        self._writer.flush()

    def close(self) -> None:
        """Writes all events."""
        self._writer.close()


class WeightsAndBiases:
    """A Weights & Biases run over tokens, continued by a resumed run.

    The id is in the run directory. The client drops rows repeated by a resumed run, because
    steps must increase.
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
        """Queues a row's numbers."""
        self._run.log(_numbers(row), step=row["tokens"])

    def flush(self) -> None:
        """Does nothing, because rows are uploaded at once."""

    def close(self) -> None:
        """Uploads the remaining rows."""
        self._run.finish()


def _encode(row: Row) -> str:
    return json.dumps({name: _finite(value) for name, value in row.items()}) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _numbers(row: Row) -> dict[str, float]:
    """Returns a row's numbers without coordinates, named `kind/name`."""
    return {
        f"{row['kind']}/{name}": value
        for name, value in row.items()
        if name not in AXES and isinstance(value, int | float)
    }
