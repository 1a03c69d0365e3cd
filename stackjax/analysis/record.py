"""A run's record: config, data and metric rows."""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from stackjax.analysis.loss_curve import Curve
from stackjax.analysis.names import COSTS
from stackjax.checkpoint.lineage import Generation, total
from stackjax.config import Stage
from stackjax.config_record import recorded_seq_len
from stackjax.data.source_metrics import of_sources
from stackjax.files.json_file import decode
from stackjax.growth import Growth, parse_growth
from stackjax.model.config import EXECUTION, ModelConfig
from stackjax.options import LossName
from stackjax.runtime.errors import UserError
from stackjax.training.phase import Counts
from stackjax.training.stages import stage_lengths

_ROW_NAMES = {"held_out": "held_out_loss", "train": "loss"}
_NOT_TRAINING = re.compile(
    r"seed|workdir|platform|init_from|(mesh|evaluation|probes|tasks|checkpoints|logging)\..*"
    r"|stages\.\d+\.(mesh(\..*)?|accumulate|remat|loss_chunk|moment_memory)"
    r"|data\.(path|sources\.\d+\.path|cache_dir|corpus|num_workers|prefetch)"
    r"|data\.(sources\.\d+\.)?max_epochs"
    r"|model\.(attention|remat|scan_unroll|loss_chunk)"
)
"""Fields without influence on training, except for rounding. The data digest and the lineage
stand for the data path and the initial model."""
_AVERAGE = re.compile(r"stages\.\d+\.average_checkpoints")
_NEWER = {
    _AVERAGE: 1,
    re.compile(r"model\.loops"): 1,
    re.compile(r"data\.packing"): "joined",
}
"""Defaults of fields that older records lack."""
_SIZES = ("num_layers", "embed_dim", "mlp_dim", "num_heads", "num_kv_heads", "head_dim")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
    """A run directory's content."""

    path: epath.Path
    config: Mapping[str, Any]
    """Every field, by command-line name."""
    data: Mapping[str, str]
    """Hashes for token shards and tokenizer."""
    rows: Sequence[Mapping[str, Any]]
    origin: tuple[Generation, ...] = ()
    """The initial model's lineage; empty for a new model."""

    @property
    def growths(self) -> tuple[Growth | None, ...]:
        """The growth into each stage; None if the stage keeps the model."""
        texts = (self.config[f"stages.{i}.growth"] for i in range(self.num_stages))
        return tuple(parse_growth(text) if text else None for text in texts)

    @property
    def all_growths(self) -> list[Growth]:
        """All growths, including growths before the run."""
        before = [parse_growth(each.growth) for each in self.origin if each.growth]
        return before + [growth for growth in self.growths if growth is not None]

    @property
    def growth_tokens(self) -> list[int]:
        """Tokens before each growth so far."""
        before = [
            total(self.origin[:i]).tokens for i, each in enumerate(self.origin) if each.growth
        ]
        first_rows = {row["stage"]: row for row in reversed(self.seams)}
        within = sorted(row["tokens"] for row in first_rows.values())
        return before + [self.charge.tokens + tokens for tokens in within]

    @property
    def charge(self) -> Counts:
        """The initial model's cost."""
        return total(self.origin)

    @property
    def charge_numbers(self) -> dict[str, Any] | None:
        """The charge for JSON; None for a new model."""
        return dataclasses.asdict(self.charge) if self.origin else None

    @property
    def flops_6nd(self) -> float:
        """FLOPs (6ND) so far, including the charge."""
        return self.charge.flops_6nd + self.rows[-1]["flops_6nd"]

    @property
    def training(self) -> dict[str, Any]:
        """All settings shared by runs that differ only in their seed."""
        ignores_spikes = self.config.get("spikes.action") == "ignore"
        fields = {
            name: value
            for name, value in self.config.items()
            if not _NOT_TRAINING.fullmatch(name)
            # As in older records, without these fields.
            and value is not None
            and not (ignores_spikes and name.startswith("spikes."))
            and not any(n.fullmatch(name) and value == old for n, old in _NEWER.items())
        }
        if any(map(_AVERAGE.fullmatch, fields)):
            interval = "checkpoints.every_tokens"  # determines which checkpoints are averaged
            fields[interval] = self.config.get(interval)
        start = [(each.growth, str(each.model), each.spent) for each in self.origin]
        return {**fields, **self.data, "init_from": str(start)}

    @property
    def data_paths(self) -> list[str]:
        """Paths of the data's sources."""
        paths = re.compile(r"data\.(sources\.\d+\.)?path")
        return [value for name, value in self.config.items() if value and paths.fullmatch(name)]

    @property
    def seq_len(self) -> int:
        """Tokens per sequence in the last stage."""
        return recorded_seq_len(self.config, self.num_stages - 1)

    def knows(self, cost: str) -> bool:
        """Returns whether a cost is known; a lineage has no device-seconds."""
        return cost != "device_seconds" or not self.origin

    @property
    def final_model(self) -> ModelConfig:
        """The last stage's model, without initialization and execution fields."""
        fields: dict[str, Any] = {}
        for name, value in self._model_fields.items():
            *place, field = name.removeprefix("model.").split(".")
            if name.startswith("model.") and field not in EXECUTION:
                inner = fields
                for part in place:
                    inner = inner.setdefault(part, {})
                    if not isinstance(inner, dict):
                        where = ".".join(place)
                        raise UserError(f"{name} is {value}, but model.{where} is {inner}")
                inner[field] = value
        if "pattern" in fields:
            places = sorted(fields["pattern"], key=int)
            fields["pattern"] = [fields["pattern"][place] for place in places]
        model = decode(ModelConfig, fields, "model")
        for growth in self.growths if self.config["model_is"] == "source" else ():
            model = growth.target_config(model) if growth else model
        return model

    @property
    def _model_fields(self) -> dict[str, Any]:
        """The fields of the config's model, with the positions of the last stage."""
        last = f"stages.{self.num_stages - 1}."
        own = {
            f"model.{name.removeprefix(last)}": value
            for name, value in self.config.items()
            if name.startswith(f"{last}rope_") and value is not None
        }
        fields = {name: v for name, v in self.config.items() if name.startswith("model.")}
        if any(name.startswith("model.rope_scaling.") for name in own):
            fields.pop("model.rope_scaling", None)
        return fields | own

    @property
    def peak_rates(self) -> tuple[float, ...]:
        """The peak learning rate of each stage."""
        common = self.config["optimizer.peak_learning_rate"]
        own = (
            self.config.get(f"stages.{i}.peak_learning_rate") for i in range(self.num_stages)
        )
        return tuple(common if rate is None else rate for rate in own)

    @property
    def final_loss(self) -> float:
        """Last held-out loss; infinity if there is none, or if it is NaN."""
        found = [row["held_out_loss"] for row in self.rows if row["kind"] == "evaluation"]
        return found[-1] if found and not math.isnan(found[-1]) else math.inf

    @property
    def final_sources(self) -> dict[str, tuple[float, float]]:
        """Last validation loss and epochs by source; empty without a mixture."""
        evaluations = [row for row in self.rows if row["kind"] == "evaluation"]
        row = evaluations[-1] if evaluations else {}
        losses, epochs = of_sources("held_out_loss", row), of_sources("epochs", row)
        return {name: (losses[name], epochs[name]) for name in epochs}

    @property
    def final_stage(self) -> int:
        """The first stage with the final model."""
        grown = [i for i, growth in enumerate(self.growths) if growth is not None]
        return grown[-1] if grown else 0

    @property
    def seams(self) -> list[Mapping[str, Any]]:
        """Rows at growths, and at the end of a learned growth's fit."""
        growths = self.growths
        return [
            row
            for row in self.rows
            if row["kind"] == "growth" and growths[row["stage"]] is not None
        ]

    @property
    def layers(self) -> list[Mapping[str, Any]]:
        """Layer-statistics rows; empty if `evaluation.layers` was off."""
        return [row for row in self.rows if row["kind"] == "layers"]

    @property
    def is_finished(self) -> bool:
        """Whether the last stage has ended, by length or by early stopping."""
        last = self.num_stages - 1
        of_last = [row for row in self.rows if row["stage"] == last]
        if any(row["kind"] == "trigger" for row in of_last):
            return True
        stages = [
            Stage(
                **{
                    name: self.config[f"stages.{i}.{name}"]
                    for name in ("tokens", "fraction", "batch_size")
                }
            )
            for i in range(self.num_stages)
        ]
        length = stage_lengths(stages)[last]
        entered = [row["tokens"] for row in of_last if row["kind"] == "growth"]
        start = entered[0] if entered else 0
        return bool(of_last) and of_last[-1]["tokens"] >= start + length

    @property
    def num_stages(self) -> int:
        """Stage count in the config."""
        return sum(f"stages.{i}.growth" in self.config for i in range(len(self.config)))

    def curve(self, loss: LossName) -> Curve:
        """Returns the final model's losses over cumulative cost.

        Raises:
          UserError: There are fewer than two losses, or a loss is not positive and finite.
        """
        name = _ROW_NAMES[loss]
        first = self.final_stage
        rows = [row for row in self.rows if row["stage"] >= first and row.get(name) is not None]
        if len(rows) < 2:
            raise UserError(
                f"{self.path} has {len(rows)} rows with {name} for its final model; a curve "
                f"needs 2, so train it further, or leave it out."
            )
        for row in rows:
            if not 0 < row[name] < math.inf:
                raise UserError(
                    f"{self.path}: {name} is {row[name]} at {row['tokens']:,} tokens, but must "
                    f"be positive and finite; leave the run out."
                )
        return Curve(
            costs={cost: self._costs(cost, rows) for cost in COSTS},
            losses=np.array([row[name] for row in rows], float),
        )

    def all_losses(self, loss: LossName, cost: str) -> tuple[np.ndarray, np.ndarray]:
        """Returns cumulative costs and losses in all stages, for a figure.

        NaN separates the stages. Before each growth comes the loss just before it.
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
            return np.array([getattr(self.charge, cost) + row[cost] for row in rows], float)
        if not self.knows(cost):
            return np.full(len(rows), np.nan)
        trained = [row for row in self.rows if row["kind"] == "train"]
        tokens = np.array([0, *(row["tokens"] for row in trained)], float)
        rates = [row["tokens_per_second"] / row["num_devices"] for row in trained]
        seconds = np.cumsum([0, *(np.diff(tokens) / rates)])
        return np.interp([row["tokens"] for row in rows], tokens, seconds)


def check_comparable(records: Sequence[Record], *, any_size: bool = False) -> None:
    """Raises UserError, with the field, if losses are not comparable.

    Args:
      any_size: May the final models have different sizes?
    """
    first, *others = records
    expected = _meaning(first, any_size)
    for other in others:
        for field, value in _meaning(other, any_size).items():
            if value != expected[field]:
                raise UserError(
                    f"{field} is {value} in {other.path}, but {expected[field]} in "
                    f"{first.path}; such losses are not comparable, so leave one run out."
                )


def _meaning(record: Record, any_size: bool) -> dict[str, Any]:
    """Returns everything besides training with an influence on the loss."""
    model = {
        f"final model's {name}": value
        for name, value in dataclasses.asdict(record.final_model).items()
        if name not in (*EXECUTION, *(_SIZES if any_size else ()))
    }
    weights = re.compile(r"data\.sources\.\d+\.weight")
    fields = {
        field: value
        for field, value in record.config.items()
        if field in ("data.mask_documents", "evaluation.num_sequences")
        or weights.fullmatch(field)
    }
    return dict(record.data) | {"data.seq_len": record.seq_len} | fields | model
