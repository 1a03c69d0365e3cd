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
    """The runs of a training at its best peak learning rates."""

    records: tuple[Record, ...]
    tried: Mapping[str, float]
    """Mean final held-out loss by peak learning rates, from low to high rates."""

    @property
    def best(self) -> str:
        """The best rates."""
        return rates(self.records[0])


def at_best_rates(trainings: Sequence[Sequence[Record]]) -> list[Tuned]:
    """Returns trainings at their best rates; two that differ only in rates are one.

    Args:
      trainings: Runs of each training, equal but for their seeds.
    """
    alike: dict[str, list[Sequence[Record]]] = {}
    for runs in trainings:
        fields = runs[0].training.items()
        others = sorted((name, value) for name, value in fields if not _RATE.fullmatch(name))
        alike.setdefault(str(others), []).append(runs)
    found = []
    for tried in alike.values():
        tried = sorted(tried, key=lambda runs: runs[0].peak_rates)
        best = min(tried, key=_loss)
        losses = {rates(runs[0]): _loss(runs) for runs in tried}
        found.append(Tuned(tuple(best), losses))
    return found


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
    tried = list(tuned.tried)
    if len(tried) == 1:
        return
    losses = "; ".join(f"{rate}: {loss:.4f}" for rate, loss in tuned.tried.items())
    yield f"{name}: the best of {len(tried)} peak learning rates ({losses})."
    if tuned.best in (tried[0], tried[-1]):
        yield (
            f"{name}: {tuned.best} is at the end of the rates tried, so better rates may lie "
            f"outside."
        )


def _loss(runs: Sequence[Record]) -> float:
    """Returns the mean final held-out loss; infinity if a run has none or diverged."""
    finals = [record.final_loss for record in runs]
    return math.fsum(finals) / len(finals)
