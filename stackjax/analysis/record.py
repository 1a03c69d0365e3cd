"""What a run has recorded of itself: its config, its data, its rows of metrics."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from etils import epath

from stackjax.analysis.curve import Curve
from stackjax.checkpoint import check_rows_of
from stackjax.config_record import RECORD, read_config_record
from stackjax.errors import UserError
from stackjax.growth import Growth, parse_growth
from stackjax.model.config import EXECUTION, ModelConfig, model_from_json
from stackjax.rows_file import read_rows
from stackjax.storage import check_bucket

LossName = Literal["held_out", "train"]

COSTS = {
    "flops_6nd": "FLOPs (6ND)",
    "flops": "FLOPs of matrix products",
    "tokens": "tokens",
    "device_seconds": "device-seconds",
}
"""What a run spends, and how people call it. All stages count, from the first token on."""

_ROW_NAMES = {"held_out": "held_out_loss", "train": "loss"}
_NEEDS = {
    "train": ("flops_6nd", "flops", "tokens_per_second", "num_devices"),
    "evaluation": ("flops_6nd", "flops"),
    "growth": ("flops_6nd", "flops", "held_out_loss_before", "held_out_loss"),
}
"""Fields that are read of each kind of row."""
_SIZES = ("num_layers", "embed_dim", "mlp_dim", "num_heads", "num_kv_heads", "head_dim")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
    """A run as its directory tells it."""

    path: epath.Path
    config: Mapping[str, Any]
    """Every field by its name on the command line."""
    data: Mapping[str, str]
    """What it read: hashes of the token shards and of the tokenizer."""
    rows: Sequence[Mapping[str, Any]]

    @property
    def growths(self) -> tuple[Growth | None, ...]:
        """The growth into each stage; None where the model stays as it is."""
        texts = (self.config[f"stages.{i}.growth"] for i in range(self._num_stages))
        return tuple(parse_growth(text) if text else None for text in texts)

    @property
    def final_model(self) -> ModelConfig:
        """The model of the last stage, whatever way it starts or computes."""
        fields: dict[str, Any] = {}
        for name, value in self.config.items():
            place, _, field = name.removeprefix("model.").rpartition(".")
            if name.startswith("model.") and field not in EXECUTION:
                inner = fields.setdefault(place, {}) if place else fields
                inner[field] = value
        model = model_from_json(fields)
        for growth in self.growths if self.config["model_is"] == "source" else ():
            model = growth.target_config(model) if growth else model
        return model

    @property
    def final_stage(self) -> int:
        """The first stage that trains the last model."""
        grown = [i for i, growth in enumerate(self.growths) if growth is not None]
        return grown[-1] if grown else 0

    @property
    def seams(self) -> list[Mapping[str, Any]]:
        """The rows of its growths, and of what follows the fit of a learned one."""
        growths = self.growths
        return [
            row
            for row in self.rows
            if row["kind"] == "growth" and growths[row["stage"]] is not None
        ]

    @property
    def layers(self) -> list[Mapping[str, Any]]:
        """The rows of its layers; none where `evaluation.layers` was off."""
        return [row for row in self.rows if row["kind"] == "layers"]

    @property
    def is_finished(self) -> bool:
        """Whether it has come to the end of its last stage, by length or by a trigger.

        Taken to be so where that length is a fraction of the run.
        """
        last = self._num_stages - 1
        of_last = [row for row in self.rows if row["stage"] == last]
        tokens = self.config[f"stages.{last}.tokens"]
        if tokens is None or any(row["kind"] == "trigger" for row in of_last):
            return True
        entered = [row["tokens"] for row in of_last if row["kind"] == "growth"]
        start = entered[0] if entered else 0
        return bool(of_last) and of_last[-1]["tokens"] >= start + tokens

    @property
    def _num_stages(self) -> int:
        return sum(f"stages.{i}.growth" in self.config for i in range(len(self.config)))

    def curve(self, loss: LossName) -> Curve:
        """Returns the losses of the run's last model over what the run had spent.

        Raises:
          UserError: There are fewer than two.
        """
        name = _ROW_NAMES[loss]
        first = self.final_stage
        rows = [row for row in self.rows if row["stage"] >= first and row.get(name) is not None]
        if len(rows) < 2:
            raise UserError(
                f"{self.path} has {len(rows)} rows of {name} for its last model, and a curve "
                f"needs two; train it further, or leave it out."
            )
        return Curve(
            costs={cost: self._costs(cost, rows) for cost in COSTS},
            losses=np.array([row[name] for row in rows], float),
        )

    def all_losses(self, loss: LossName, cost: str) -> tuple[np.ndarray, np.ndarray]:
        """Returns what had been spent, and the loss, of every stage; NaN parts the stages.

        Before a growth stands the loss that the seam has measured, so that it can be seen.
        """
        name, seams = _ROW_NAMES[loss], self.seams
        found: list[tuple[Mapping[str, Any], float]] = []
        for row in self.rows:
            if loss == "held_out" and row in seams:
                found += [(row, row["held_out_loss_before"]), (row, math.nan)]
            if row.get(name) is not None:
                found.append((row, row[name]))
        return self._costs(cost, [row for row, _ in found]), np.array([at for _, at in found])

    def _costs(self, cost: str, rows: Sequence[Mapping[str, Any]]) -> np.ndarray:
        if cost != "device_seconds":
            return np.array([row[cost] for row in rows], float)
        trained = [row for row in self.rows if row["kind"] == "train"]
        tokens = np.array([0, *(row["tokens"] for row in trained)], float)
        rates = [row["tokens_per_second"] / row["num_devices"] for row in trained]
        seconds = np.cumsum([0, *(np.diff(tokens) / rates)])
        return np.interp([row["tokens"] for row in rows], tokens, seconds)


def read_record(path: epath.PathLike) -> Record:
    """Returns what a run directory has recorded; UserError if it is none."""
    check_bucket(path)
    directory = epath.Path(path)
    record = directory / RECORD
    if not record.exists():
        raise UserError(f"{directory} has no {RECORD}; name the directory of a run.")
    found = read_config_record(record)
    check_rows_of(directory)
    rows = read_rows(directory, _NEEDS)
    trained = [row for row in rows if row["kind"] == "train"]
    if not trained:
        raise UserError(f"{directory} has not trained yet; its metrics.jsonl has no rows.")
    data = {"data": found["data"], "tokenizer": found["tokenizer"]}
    return Record(path=directory, config=found["config"], data=data, rows=rows)


def check_comparable(records: Sequence[Record], *, any_size: bool = False) -> None:
    """Raises UserError, naming the field, where losses of runs do not mean the same.

    Args:
      any_size: Whether their last models may be of different sizes.
    """
    first, *others = records
    expected = _meaning(first, any_size)
    for other in others:
        for field, value in _meaning(other, any_size).items():
            if value != expected[field]:
                raise UserError(
                    f"{field} is {value} in {other.path}, and {expected[field]} in "
                    f"{first.path}; losses of such runs do not compare, so leave one out."
                )


def _meaning(record: Record, any_size: bool) -> dict[str, Any]:
    """Returns what a loss of a run depends on, besides how it was trained."""
    model = {
        f"the last model's {name}": value
        for name, value in dataclasses.asdict(record.final_model).items()
        if name not in (*EXECUTION, *(_SIZES if any_size else ()))
    }
    fields = ("data.seq_len", "data.mask_documents", "evaluation.num_sequences")
    return dict(record.data) | {field: record.config[field] for field in fields} | model
