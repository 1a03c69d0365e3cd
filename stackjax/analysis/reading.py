"""Run directories, read and checked before anything is computed from their numbers."""

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
    "data.path": str,
    "data.seq_len": int,
    "data.mask_documents": bool,
    "evaluation.num_sequences": int,
    "optimizer.peak_learning_rate": float,
}
"""The fields of a config that every comparison reads, and their types."""
_FIELDS_OF_STAGE = {
    "growth": str | None,
    "tokens": int | None,
    "fraction": float | None,
    "batch_size": int,
    "peak_learning_rate": float | None,
}
_STAGE = re.compile(r"stages\.(\d{1,9})\..*")
_SPEEDS = ("tokens_per_second", "num_devices")
"""The numbers of a row of training that are more than 0."""
_COSTS = ("flops_6nd", "flops")
"""The numbers of a row that never fall."""


_NEEDS = {
    "train": ("flops_6nd", "flops", "tokens_per_second", "num_devices"),
    "evaluation": ("flops_6nd", "flops"),
    "growth": ("flops_6nd", "flops", "held_out_loss_before", "held_out_loss"),
}
"""The numbers of each kind of row."""


def read_record(path: epath.PathLike) -> Record:
    """Returns the record of a run directory.

    Raises:
      UserError: It is no run, has not trained yet, or is damaged.
    """
    check_bucket(path)
    directory = epath.Path(path)
    record = directory / RECORD
    if not record.exists():
        raise UserError(f"{directory} has no {RECORD}; name the directory of a run.")
    found = read_config_record(record)
    _check_fields(record, found["config"])
    check_rows_of(directory)
    rows = read_rows(directory, _NEEDS)
    if not any(row["kind"] == "train" for row in rows):
        raise UserError(
            f"{directory} has not trained yet: its metrics.jsonl has no rows of training; "
            f"leave it out."
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
    with _damage_named(record):
        for meaning in ("final_model", "growths", "is_finished"):
            getattr(read, meaning)
    return read


def _check_fields(file: epath.Path, config: Mapping[str, Any]) -> None:
    """Raises UserError if a field is missing, or has another type."""
    stages = {int(match[1]) for match in map(_STAGE.fullmatch, config) if match}
    kinds = _FIELDS | {
        f"stages.{stage}.{name}": kind
        for stage in range(max(len(stages), 1))
        for name, kind in _FIELDS_OF_STAGE.items()
    }
    missing = [name for name in kinds if name not in config]
    if missing:
        raise UserError(
            f"{file} does not say its {', '.join(missing)}, as stackjax.train records them; "
            f"train the run again, or leave it out."
        )
    with _damage_named(file):
        for name, kind in kinds.items():
            decode(kind, config[name], name)


@contextlib.contextmanager
def _damage_named(file: epath.Path) -> Iterator[None]:
    """Adds the name of a damaged file to an error."""
    try:
        yield
    except UserError as error:
        raise UserError(
            f"{file} is damaged: {error}; bring the file back from a copy of the run, or leave "
            f"the run out."
        ) from error


def _check_speeds(path: epath.Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Raises UserError for a row of training that took no time, or no device."""
    for number, row in enumerate(rows, start=1):
        for name in _SPEEDS if row["kind"] == "train" else ():
            if not row[name] > 0:
                raise UserError(
                    f"{path} is damaged: {name} is {row[name]} in row {number}, and must be "
                    f"more than 0; bring the file back from a copy of the run, or leave it out."
                )


def _check_costs(path: epath.Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Raises UserError for a row that has spent less than a row before it."""
    spent = dict.fromkeys(_COSTS, 0)
    for number, row in enumerate(rows, start=1):
        for name, before in spent.items():
            found = before if row.get(name) is None else row[name]
            if not found >= before:
                raise UserError(
                    f"{path} is damaged: {name} is {found} in row {number}, and must be at "
                    f"least {before}, as in the rows before; bring the file back from a "
                    f"copy of the run, or leave it out."
                )
            spent[name] = found
