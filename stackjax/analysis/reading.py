"""Run directories, read and checked before anything is computed from their numbers."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from stackjax.analysis.charge import read_origin
from stackjax.analysis.record import Record
from stackjax.errors import UserError
from stackjax.metrics import read_rows

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


def read_record(path: epath.PathLike) -> Record:
    """Returns what a run directory has recorded; UserError if it is none."""
    directory = epath.Path(path)
    record = directory / "config.json"
    if not record.exists():
        raise UserError(f"{directory} has no config.json; name the directory of a run.")
    found, rows = _read_config(record), read_rows(directory)
    if not any(row.get("kind") == "train" for row in rows):
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


def _read_config(path: epath.Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); mend it, or leave it out.") from None
    kinds = {"config": dict, "data": str, "tokenizer": str}
    fields = found if isinstance(found, dict) else {}
    missing = [name for name, kind in kinds.items() if not isinstance(fields.get(name), kind)]
    missing += [] if missing else [name for name in _FIELDS if name not in fields["config"]]
    if missing:
        raise UserError(
            f"{path} does not say its {', '.join(missing)}, as stackjax.train records them; "
            f"train the run again, or leave it out."
        )
    return fields


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
