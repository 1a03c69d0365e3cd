"""Reads and checks run directories."""

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from etils import epath

from stackjax.analysis.charge import read_origin
from stackjax.analysis.record import Record
from stackjax.checkpoint.restore import check_rows_of
from stackjax.config_record import RECORD, read_config_record
from stackjax.files.json_file import decode
from stackjax.files.rows_file import read_rows
from stackjax.files.storage import check_bucket
from stackjax.runtime.errors import UserError

_FIELDS = {
    "seed": int,
    "model_is": Literal["source", "target"],
    "data.path": str | None,
    "data.seq_len": int,
    "data.mask_documents": bool,
    "evaluation.num_sequences": int,
    "optimizer.peak_learning_rate": float,
}
"""Types for config fields used by every comparison."""
_FIELDS_OF_STAGE = {
    "growth": str | None,
    "tokens": int | None,
    "fraction": float | None,
    "batch_size": int,
    "peak_learning_rate": float | None,
}
_STAGE = re.compile(r"stages\.(\d{1,9})\..*")
_SPEEDS = ("tokens_per_second", "num_devices")
"""Positive numbers in a training row."""
_COSTS = ("flops_6nd", "flops")
"""Cumulative numbers in any row."""
_NEEDS = {
    "train": ("flops_6nd", "flops", "tokens_per_second", "num_devices"),
    "evaluation": ("flops_6nd", "flops"),
    "growth": ("flops_6nd", "flops", "held_out_loss_before", "held_out_loss"),
}
"""Required numbers by row kind."""
_RESTORE = "restore the file from a backup, or leave the run out"


def read_record(path: epath.PathLike) -> Record:
    """Returns a run directory's record.

    Raises:
      UserError: The directory is no run, has no training rows, or is damaged.
    """
    check_bucket(path)
    directory = epath.Path(path)
    record = directory / RECORD
    if not record.exists():
        raise UserError(f"{directory} has no {RECORD}; name a run directory.")
    found = read_config_record(record)
    _check_fields(record, found["config"])
    check_rows_of(directory)
    rows = read_rows(directory, _NEEDS)
    if not any(row["kind"] == "train" for row in rows):
        raise UserError(
            f"{directory}: metrics.jsonl has no training rows yet; leave the run out."
        )
    _check_speeds(directory / "metrics.jsonl", rows)
    _check_costs(directory / "metrics.jsonl", rows)
    read = Record(
        path=directory,
        config=found["config"],
        data={"data": found["data"], "tokenizer": found["tokenizer"]},
        rows=rows,
        origin=read_origin(directory, found["config"]),
    )
    with _damage_in(record):
        for derived in ("final_model", "growths", "is_finished"):
            getattr(read, derived)
    return read


def _check_fields(file: epath.Path, config: Mapping[str, Any]) -> None:
    """Raises UserError if a field is missing, or has the wrong type."""
    stages = {int(match[1]) for match in map(_STAGE.fullmatch, config) if match}
    kinds = _FIELDS | {
        f"stages.{stage}.{name}": kind
        for stage in range(max(len(stages), 1))
        for name, kind in _FIELDS_OF_STAGE.items()
    }
    missing = [name for name in kinds if name not in config]
    if missing:
        raise UserError(
            f"{file} lacks {', '.join(missing)}, as recorded by stackjax.train; train the run "
            f"again, or leave it out."
        )
    with _damage_in(file):
        for name, kind in kinds.items():
            decode(kind, config[name], name)


@contextlib.contextmanager
def _damage_in(file: epath.Path) -> Iterator[None]:
    """Adds the file name to a UserError."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{file} is damaged: {error}; {_RESTORE}.") from error


def _check_speeds(path: epath.Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Raises UserError if a training row's speed or device count is not positive."""
    for number, row in enumerate(rows, start=1):
        for name in _SPEEDS if row["kind"] == "train" else ():
            if not row[name] > 0:
                raise UserError(
                    f"{path} is damaged: {name} is {row[name]} in row {number}, but must be "
                    f"more than 0; {_RESTORE}."
                )


def _check_costs(path: epath.Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Raises UserError if a cumulative cost decreases."""
    spent = dict.fromkeys(_COSTS, 0)
    for number, row in enumerate(rows, start=1):
        for name, before in spent.items():
            found = before if row.get(name) is None else row[name]
            if not found >= before:
                raise UserError(
                    f"{path} is damaged: {name} is {found} in row {number}, but must be at "
                    f"least {before}, its value in earlier rows; {_RESTORE}."
                )
            spent[name] = found
