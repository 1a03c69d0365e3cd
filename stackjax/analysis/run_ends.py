"""Final losses and scaling laws."""

import dataclasses
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from stackjax.analysis.record import Record, check_comparable
from stackjax.analysis.scaling import GapLaw, PowerLaw, fit_gap, fit_power_law
from stackjax.analysis.settings import SAME_FLOPS, charges, differences, lengths, settings
from stackjax.model import ModelConfig
from stackjax.model.flops import num_params
from stackjax.options import LossName
from stackjax.runtime.errors import UserError
from stackjax.runtime.numbers import short


@dataclasses.dataclass(frozen=True, kw_only=True)
class End:
    """A run's end."""

    path: str
    growth: str
    """All growths, or `scratch`."""
    model: ModelConfig
    seed: int
    tokens: int
    """Tokens in all stages, including the initial model's."""
    flops: float
    """FLOPs (6ND) for `tokens`."""
    loss: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pair:
    """A grown run and a run from scratch with equal model, FLOPs and seed."""

    scratch: End
    grown: End

    @property
    def gap(self) -> float:
        """Scratch's loss minus the grown run's loss."""
        return self.scratch.loss - self.grown.loss


@dataclasses.dataclass(frozen=True, kw_only=True)
class Laws:
    """Final losses and their scaling laws."""

    records: Sequence[Record]
    ends: list[End]
    pairs: list[Pair]
    power_laws: Mapping[str, PowerLaw] | str
    """By growth, or the reason for their absence."""
    gap_laws: Mapping[str, GapLaw] | str
    """By growth, or the reason for their absence."""


def fit_laws(records: Sequence[Record], loss: LossName) -> Laws:
    """Returns final losses and their scaling laws.

    Raises:
      UserError: The runs are not comparable, or they suffice for no law.
    """
    ends = ends_of(records, loss)
    pairs = pairs_of(ends)
    laws, gaps = _fit_or_reason(power_laws, ends), _fit_or_reason(gap_laws, pairs)
    if isinstance(laws, str) and isinstance(gaps, str):
        raise UserError(f"{laws} And {gaps}")
    return Laws(records=records, ends=ends, pairs=pairs, power_laws=laws, gap_laws=gaps)


def _fit_or_reason(fit: Callable[[Sequence[Any]], Any], points: Sequence[Any]) -> Any:
    try:
        return fit(points)
    except UserError as error:
        return str(error)


def ends_of(records: Sequence[Record], loss: LossName) -> list[End]:
    """Returns every run's end, by increasing cost.

    Raises:
      UserError: Losses are not comparable apart from model size, a run is unfinished, or a run
        is listed twice.
    """
    check_comparable(records, any_size=True)
    found = []
    for record in records:
        if not record.is_finished:
            raise UserError(
                f"{record.path} is unfinished, so its learning rate has not decayed; let it "
                f"finish, or leave it out."
            )
        curve = record.curve(loss)
        end = End(
            path=str(record.path),
            growth=_growth(record),
            model=record.final_model,
            seed=record.config["seed"],
            tokens=int(curve.costs["tokens"][-1]),
            flops=float(curve.costs["flops_6nd"][-1]),
            loss=float(curve.losses[-1]),
        )
        if end in (dataclasses.replace(other, path=end.path) for other in found):
            raise UserError(
                f"{record.path} is listed twice or is a copy of another run; runs count as "
                f"independent, so leave one out."
            )
        found.append(end)
    return sorted(found, key=lambda end: end.flops)


def _growth(record: Record) -> str:
    return ", ".join(map(str, record.all_growths)) or "scratch"


def notes(records: Sequence[Record]) -> list[str]:
    """Returns a sentence for each difference between a law's runs, and each charge.

    Differences are settings, tokens per parameter, and growth timing.
    """
    said = differences({str(record.path): settings(record) for record in records})
    by_name: dict[str, dict[str, dict[str, str]]] = {}
    for record in records:
        by_name.setdefault(_growth(record), {})[str(record.path)] = lengths(record)
    for growth, found in by_name.items():
        said += [f"{growth}: {sentence}" for sentence in differences(found)]
    return said + [charge for record in records for charge in charges(record)]


def pairs_of(ends: Sequence[End]) -> list[Pair]:
    """Returns all pairs at equal FLOPs: a grown run and a run from scratch."""
    scratch = [end for end in ends if end.growth == "scratch"]
    return [
        Pair(scratch=other, grown=end)
        for end in ends
        if end.growth != "scratch"
        for other in scratch
        if (other.model, other.seed) == (end.model, end.seed)
        and abs(other.flops - end.flops) <= SAME_FLOPS * end.flops
    ]


def power_laws(ends: Sequence[End]) -> dict[str, PowerLaw]:
    """Returns loss-over-FLOPs laws for scratch and each growth with three sizes.

    Raises:
      UserError: Scratch has fewer than three sizes, or all growths have.
    """
    sizes = {
        growth: len({num_params(end.model) for end in of_growth})
        for growth, of_growth in by_growth(ends).items()
    }
    enough = [growth for growth, count in sizes.items() if count >= 3]
    if "scratch" not in enough or len(enough) == 1:
        said = ", ".join(f"{name} has {count}" for name, count in sizes.items())
        raise UserError(
            f"model sizes: {said}; a law of loss over compute needs 3 for scratch and for a "
            f"growth, because a fixed size has a loss floor."
        )
    return {
        growth: fit_power_law([end.flops for end in of_growth], [end.loss for end in of_growth])
        for growth, of_growth in by_growth(ends).items()
        if growth in enough
    }


def by_growth(ends: Sequence[End]) -> dict[str, list[End]]:
    """Returns ends by growth, scratch first."""
    names = sorted({end.growth for end in ends}, key=lambda name: (name != "scratch", name))
    return {name: [end for end in ends if end.growth == name] for name in names}


def gap_laws(pairs: Sequence[Pair]) -> dict[str, GapLaw]:
    """Returns gap-over-tokens laws for each growth and size.

    A law needs three lengths. Grown runs with the same scratch run form a single point.

    Raises:
      UserError: No growth has three lengths.
    """
    found = {}
    for name, gaps in gap_points(pairs).items():
        if len({tokens for tokens, _ in gaps}) >= 3:
            found[name] = fit_gap(*zip(*gaps, strict=True))
    if not found:
        raise UserError(
            "no growth has runs of 3 lengths for the same size, each with a run from scratch "
            "at equal FLOPs; a law of the gap over tokens needs them."
        )
    return found


def gap_points(pairs: Sequence[Pair]) -> dict[str, list[tuple[int, float]]]:
    """Returns scratch's tokens and mean gaps, by growth, and by size if there are several."""
    sizes = {num_params(pair.grown.model) for pair in pairs}
    shared: dict[str, dict[End, list[float]]] = {}
    for pair in pairs:
        size = f", {short(num_params(pair.grown.model))} parameters" if len(sizes) > 1 else ""
        of_name = shared.setdefault(f"{pair.grown.growth}{size}", {})
        of_name.setdefault(pair.scratch, []).append(pair.gap)
    return {
        name: [(scratch.tokens, statistics.mean(gaps)) for scratch, gaps in of_name.items()]
        for name, of_name in shared.items()
    }
