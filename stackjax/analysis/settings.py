"""Settings in words: models, data, learning rates, and differences between runs."""

import dataclasses
import itertools
import os.path
from collections.abc import Mapping, Sequence
from typing import Any

from stackjax.analysis.record import Record
from stackjax.config import Schedule
from stackjax.model.flops import num_params
from stackjax.runtime.numbers import short

_SCHEDULE = tuple(field.name for field in dataclasses.fields(Schedule))
_STAGE = ("batch_size", "train_layers", "scale_by_fan_in", "optimizer_state")
SAME_FLOPS = 0.03
"""FLOPs with a smaller relative difference count as equal: runs end with whole steps."""
_SHOWN_RUNS = 12
"""Most runs listed in a line."""


def settings(record: Record) -> dict[str, Any]:
    """Returns the last stage's optimizer, learning rate, batch and devices."""
    config, last = record.config, record.num_stages - 1
    optimizer = {
        name: value
        for name, value in config.items()
        if name.startswith("optimizer.")
        and not name.startswith(("optimizer.schedule.", "optimizer.peak_learning_rate"))
    }
    stage = {f"last stage's {name}": config.get(f"stages.{last}.{name}") for name in _STAGE}
    if last == 0 or record.growths[last] is None:
        del stage["last stage's optimizer_state"]
    else:
        number = config.get(f"stages.{last}.average_checkpoints", 1)
        stage["last stage's average_checkpoints"] = number
    schedule = {
        f"last stage's schedule.{name}": _schedule(record, last, name) for name in _SCHEDULE
    }
    devices = [row["num_devices"] for row in record.rows if row["kind"] == "train"]
    rate = {"last stage's peak_learning_rate": record.peak_rates[last]}
    return optimizer | rate | schedule | stage | {"number of devices": devices[-1]}


def lengths(record: Record) -> dict[str, Any]:
    """Returns tokens per parameter, and the token share before the last growth."""
    tokens = record.charge.tokens + record.rows[-1]["tokens"]
    found = {"tokens per parameter": f"{tokens / num_params(record.final_model):.3g}"}
    grown = record.growth_tokens
    if grown:
        found["share of tokens before growth"] = f"{grown[-1] / tokens:.2g}"
    return found


def uneven(ends: Mapping[str, float]) -> list[str]:
    """Returns a sentence about unequal final FLOPs (6ND), if unequal."""
    if max(ends.values()) <= (1 + SAME_FLOPS) * min(ends.values()):
        return []
    spent = ", ".join(f"{flops:.3g} ({name})" for name, flops in ends.items())
    return [
        f"Not equal: FLOPs (6ND) at the end are {spent}; learning rates decay near the end, so "
        f"the shorter run has an advantage at its own cost."
    ]


def charges(record: Record) -> list[str]:
    """Returns a sentence about the charge, if any."""
    if not record.origin:
        return []
    charge = record.charge
    return [
        f"{record.path}: init_from is {record.config['init_from']}, charged with "
        f"{short(charge.tokens)} tokens and {charge.flops_6nd:.3g} FLOPs (6ND); data and "
        f"device-seconds of that training are unknown."
    ]


def _schedule(record: Record, stage: int, name: str) -> Any:
    stated = f"stages.{stage}.schedule.{name}"
    return record.config.get(stated, record.config.get(f"optimizer.schedule.{name}"))


def differences(found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Returns a sentence for each setting with several values.

    Args:
      found: Settings by run or group.
    """
    sentences = []
    for field in dict.fromkeys(field for each in found.values() for field in each):
        by_value: dict[str, list[str]] = {}
        for name, each in found.items():
            if field in each:
                by_value.setdefault(str(each[field]), []).append(name)
        if len(by_value) > 1:
            said = (f"{value} in {_and_more(names)}" for value, names in by_value.items())
            sentences.append(f"Not equal: {field} is {'; '.join(said)}.")
    return sentences


def _and_more(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def trace(records: Sequence[Record]) -> list[str]:
    """Returns the provenance as lines."""
    return [f"{name}: {value}" for name, value in provenance(records).items()]


def provenance(records: Sequence[Record]) -> dict[str, str]:
    """Returns models, data, learning rates and paths, in words."""
    models = dict.fromkeys(_model(record) for record in records)
    data = dict.fromkeys(_data(record) for record in records)
    return {
        "models": "; ".join(models),
        "data": "; ".join(data),
        "peak learning rates": "; ".join(dict.fromkeys(map(rates, records))),
        "runs": _paths([str(record.path) for record in records]),
    }


def _model(record: Record) -> str:
    model = record.final_model
    return (
        f"{model.num_layers} layers x {model.embed_dim} channels, "
        f"{short(num_params(model))} parameters"
    )


def _data(record: Record) -> str:
    digest, paths = record.data["data"][:12], ", ".join(record.data_paths)
    return f"{digest} ({paths}), {record.data['tokenizer']}, sequences of {record.seq_len}"


def rates(record: Record) -> str:
    """Returns the peak learning rates of the stages, in words."""
    return ", then ".join(f"{rate:g}" for rate, _ in itertools.groupby(record.peak_rates))


def _paths(paths: Sequence[str]) -> str:
    if len(paths) <= _SHOWN_RUNS:
        return ", ".join(paths)
    try:
        common = os.path.commonpath(paths)
    except ValueError:  # absolute and relative paths
        common = ""
    return f"{len(paths)} of {common or '.'}: {', '.join(paths[:_SHOWN_RUNS])}, ..."
