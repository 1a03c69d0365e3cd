"""Peak learning rates tried for a training, and the best one."""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence

from stackjax.analysis.record import Record
from stackjax.analysis.settings import rates

_RATE = re.compile(r"(optimizer|stages\.\d+)\.peak_learning_rate")


@dataclasses.dataclass(frozen=True)
class Tuned:
    """A training at the peak learning rates tried, from low to high; equal but for seeds."""

    tried: tuple[tuple[Record, ...], ...]

    @property
    def best(self) -> int:
        """The place of the rates with the lowest mean of final held-out losses."""
        return min(range(len(self.tried)), key=lambda place: _loss(self.tried[place]))

    @property
    def records(self) -> tuple[Record, ...]:
        """The runs at the best rates."""
        return self.tried[self.best]


def at_best_rates(trainings: Sequence[Sequence[Record]]) -> list[Tuned]:
    """Returns trainings with the rates tried; two that differ only in rates are one.

    Args:
      trainings: Runs of each training, equal but for their seeds.
    """
    alike: dict[str, list[tuple[Record, ...]]] = {}
    for runs in trainings:
        fields = runs[0].training.items()
        others = sorted((name, value) for name, value in fields if not _RATE.fullmatch(name))
        alike.setdefault(str(others), []).append(tuple(runs))
    return [
        Tuned(tuple(sorted(tried, key=lambda runs: runs[0].peak_rates)))
        for tried in alike.values()
    ]


def notes(tuned: Mapping[str, Tuned]) -> list[str]:
    """Returns sentences about the rates tried, and about unequal tuning.

    Args:
      tuned: Trainings by name.
    """
    said = [line for name, each in tuned.items() for line in _tried(name, each)]
    counts = {name: len(each.tried) for name, each in tuned.items()}
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{count} for {name}" for name, count in counts.items())
        said.append(
            f"Not tuned alike: peak learning rates tried are {listed}; a part of the "
            f"difference may be the tuning's."
        )
    return said


def _tried(name: str, tuned: Tuned) -> Iterator[str]:
    count = len(tuned.tried)
    if count == 1:
        return
    losses = "; ".join(
        f"{rates(runs[0])}: {_loss(runs):.4f}, {len(runs)} seed{'s' * (len(runs) > 1)}"
        for runs in tuned.tried
    )
    yield f"{name}: the best of {count} peak learning rates ({losses})."
    if tuned.best in (0, count - 1):
        yield (
            f"{name}: {rates(tuned.records[0])} is at the end of the rates tried, so better "
            f"rates may lie outside."
        )
    for runs in tuned.tried:
        for record in runs:
            if not record.is_finished and record not in tuned.records:
                yield f"{record.path} is unfinished, and its rate may be better at the end."


def _loss(runs: Sequence[Record]) -> float:
    """Returns the mean final held-out loss; infinity if a run has none or diverged."""
    return math.fsum(record.final_loss for record in runs) / len(runs)
