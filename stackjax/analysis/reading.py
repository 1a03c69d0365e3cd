"""Run directories, read and checked before anything is computed from their numbers."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from stackjax.analysis.charge import read_origin
from stackjax.analysis.record import Record
from stackjax.checkpoint import check_rows_of
from stackjax.config_record import RECORD, read_config_record
from stackjax.errors import UserError
from stackjax.rows_file import read_rows
from stackjax.storage import check_bucket

_FIELDS = (
    "seed",
    "model_is",
    "data.path",
    "data.seq_len",
    "data.mask_documents",
    "evaluation.num_sequences",
    "optimizer.peak_learning_rate",
    "stages.0.growth",
    "stages.0.batch_size",
)
"""The fields of a config that every comparison reads."""
_COUNTS = ("stage", "tokens", "flops_6nd", "flops")
"""The numbers of every row."""
_SPEEDS = ("tokens_per_second", "num_devices")
"""The numbers of a row of training, besides."""


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
    missing = [name for name in _FIELDS if name not in found["config"]]
    if missing:
        raise UserError(
            f"{record} does not say its {', '.join(missing)}, as stackjax.train records them; "
            f"train the run again, or leave it out."
        )
    check_rows_of(directory)
    rows = read_rows(directory, _NEEDS)
    if not any(row["kind"] == "train" for row in rows):
        raise UserError(
            f"{directory} has not trained yet: its metrics.jsonl has no rows of training; "
            f"leave it out."
        )
    _check_rows(directory / "metrics.jsonl", rows)
    return Record(
        path=directory,
        config=found["config"],
        data={"data": found["data"], "tokenizer": found["tokenizer"]},
        rows=rows,
        origin=read_origin(directory, found["config"]),
    )


def _check_rows(path: epath.Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Raises UserError for a row without a number that a curve is made of."""
    tokens = 0
    for number, row in enumerate(rows, start=1):
        speeds = _SPEEDS if row.get("kind") == "train" else ()
        least = dict.fromkeys(_COUNTS, 0) | dict.fromkeys(speeds, 1e-9) | {"tokens": tokens}
        for name, low in least.items():
            value = row.get(name)
            if not isinstance(value, int | float) or not low <= value < math.inf:
                raise UserError(
                    f"{path} is damaged: {name} is {value} in row {number}, and must be at "
                    f"least {low:g}; mend it, or leave the run out."
                )
        tokens = row["tokens"]
