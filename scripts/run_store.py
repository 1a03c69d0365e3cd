"""Finished runs as data, without checkpoints: one JSON line for each run.

A run is known by its config; learning rate and seed are apart, and the run directory does not
count. Stores of several machines can be concatenated.
"""

import dataclasses
import json
import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import jax
from etils import epath

from stackjax.analysis.reading import read_record
from stackjax.config import Config
from stackjax.config_file import flatten, with_defaults
from stackjax.config_record import RECORD, read_config_record
from stackjax.files.json_file import Fields, decode, hash_of, parse_object
from stackjax.runtime.errors import UserError

Scalar = str | bool | int | float | None
_APART = ("seed", "workdir", "optimizer.peak_learning_rate")


@dataclasses.dataclass(frozen=True)
class StoredRun:
    """A finished run."""

    rate: float
    """The peak learning rate."""
    seed: int
    evaluations: tuple[tuple[float, ...], ...]
    """Tokens, FLOPs (6ND), FLOPs of matrix products, and held-out loss at each evaluation."""
    growths: tuple[tuple[float, ...], ...]
    """Tokens, and held-out loss before and after, at each growth."""
    device_seconds: float
    data: str
    """Hash of the token shards."""
    jax: str
    """Version of JAX."""

    diverged: bool = False
    """Whether the loss became NaN or infinite, before the end."""

    @property
    def loss(self) -> float:
        """The final held-out loss; infinity if the run diverged."""
        return math.inf if self.diverged else self.evaluations[-1][-1]


class RunStore:
    """The runs of a file, by config.

    Raises:
      UserError: The file is damaged.
    """

    def __init__(self, path: Path):
        self._path = path
        self._fields: dict[str, dict[str, Any]] = {}
        self._runs: dict[str, dict[tuple[float, int], StoredRun]] = {}
        lines = path.read_text().splitlines() if path.exists() else ()
        for number, line in enumerate(lines, 1):
            try:
                self._add(parse_object(line.encode()))
            except UserError as error:
                raise UserError(
                    f"line {number} of {path} is no run ({error}); remove the line, and the "
                    f"run trains again."
                ) from None

    def _add(self, line: Fields) -> None:
        name = decode(str, line.pop("config", None), "config")
        if "fields" in line:
            self._fields[name] = decode(dict[str, Scalar], line["fields"], "fields")
        else:
            run = decode(StoredRun, line)
            self._runs.setdefault(name, {})[run.rate, run.seed] = run

    def runs(self, config: Config) -> Mapping[tuple[float, int], StoredRun]:
        """Returns the runs of a config, by learning rate and seed."""
        # Stores of versions with different fields may be concatenated.
        return {
            label: run
            for name in self._names(config)
            for label, run in self._runs.get(name, {}).items()
        }

    def _names(self, config: Config) -> list[str]:
        """Returns the names of a config in the file; one for each set of fields."""
        fields = _fields(config)
        return [
            name
            for name, stored in self._fields.items()
            if _known(with_defaults(config, stored)) == fields
        ]

    def add(self, config: Config, *, diverged: bool = False) -> None:
        """Adds a run to the file, at its end, from its directory."""
        lines: list[dict[str, Any]] = []
        names = self._names(config)
        if not names:
            fields = _fields(config)
            names = [hash_of(fields)[:12]]
            lines.append({"config": names[0], "fields": fields})
        run = _diverged(config) if diverged else _read(config)
        lines.append({"config": names[0], **dataclasses.asdict(run)})
        text = "".join(f"{json.dumps(line)}\n" for line in lines)
        # A single write, so that two commands can share the file.
        with self._path.open("a") as file:
            file.write(text)
        for line in text.splitlines():
            self._add(parse_object(line.encode()))


def provenance(runs: Collection[StoredRun]) -> str:
    """Returns the data and the versions of JAX, in words."""
    data, versions = {run.data[:12] for run in runs}, {run.jax for run in runs}
    return f"data: {', '.join(sorted(data))}; JAX {', '.join(sorted(versions))}"


def _fields(config: Config) -> dict[str, Any]:
    return _known(json.loads(json.dumps(flatten(config))))


def _known(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name not in _APART}


def _read(config: Config) -> StoredRun:
    record = read_record(config.workdir)
    names = ("tokens", "flops_6nd", "flops", "held_out_loss")
    evaluations = [row for row in record.rows if row["kind"] == "evaluation"]
    at_growth = ("tokens", "held_out_loss_before", "held_out_loss")
    return StoredRun(
        rate=config.optimizer.peak_learning_rate,
        seed=config.seed,
        evaluations=tuple(tuple(row[name] for name in names) for row in evaluations),
        growths=tuple(tuple(row[name] for name in at_growth) for row in record.seams),
        device_seconds=float(record.curve("held_out").costs["device_seconds"][-1]),
        data=record.data["data"],
        jax=jax.__version__,
    )


def _diverged(config: Config) -> StoredRun:
    return StoredRun(
        rate=config.optimizer.peak_learning_rate,
        seed=config.seed,
        evaluations=(),
        growths=(),
        device_seconds=0.0,
        data=read_config_record(epath.Path(config.workdir) / RECORD)["data"],
        jax=jax.__version__,
        diverged=True,
    )
