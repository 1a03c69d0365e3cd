"""The ends of runs of many sizes and lengths, and the laws through them."""

import dataclasses
import statistics
from collections.abc import Sequence

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
    """A run at its end."""

    path: str
    growth: str
    """How its model has grown, or "scratch"."""
    model: ModelConfig
    seed: int
    tokens: int
    """Of all stages, and of the model that it started from."""
    flops: float
    """By 6ND, of the same."""
    loss: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pair:
    """A grown run and the one from scratch of its model, its FLOPs and its seed."""

    scratch: End
    grown: End

    @property
    def gap(self) -> float:
        """Scratch's loss less that of the grown run."""
        return self.scratch.loss - self.grown.loss


def ends_of(records: Sequence[Record], loss: LossName) -> list[End]:
    """Returns the end of every run, those that cost least first.

    Raises:
      UserError: Their losses do not mean the same, but for the size of the last model; one has
        not finished, or stands twice.
    """
    check_comparable(records, any_size=True)
    found = []
    for record in records:
        if not record.is_finished:
            raise UserError(
                f"{record.path} has not come to the end of its last stage, where its learning "
                f"rate has come down; let it finish, or leave it out."
            )
        curve = record.curve(loss)
        end = End(
            path=str(record.path),
            growth=", ".join(map(str, record.all_growths)) or "scratch",
            model=record.final_model,
            seed=record.config["seed"],
            tokens=int(curve.costs["tokens"][-1]),
            flops=float(curve.costs["flops_6nd"][-1]),
            loss=float(curve.losses[-1]),
        )
        if end in (dataclasses.replace(other, path=end.path) for other in found):
            raise UserError(
                f"{record.path} is the same run as another, and runs count as independent; "
                f"name one of them."
            )
        found.append(end)
    return sorted(found, key=lambda end: end.flops)


def notes(records: Sequence[Record]) -> list[str]:
    """Returns a sentence for everything in which runs of one law are not alike.

    Besides their sizes: settings, tokens for each parameter, and the timing of a growth.
    """
    said = differences({str(record.path): settings(record) for record in records})
    by_name: dict[str, dict[str, dict[str, str]]] = {}
    for record in records:
        growth = ", ".join(map(str, record.all_growths)) or "scratch"
        by_name.setdefault(growth, {})[str(record.path)] = lengths(record)
    for growth, found in by_name.items():
        said += [f"{growth}: {sentence}" for sentence in differences(found)]
    return said + [charge for record in records for charge in charges(record)]


def pairs_of(ends: Sequence[End]) -> list[Pair]:
    """Returns the pairs of a grown run and one from scratch, for the same FLOPs."""
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
    """Returns the law of loss over FLOPs of each growth that has three sizes, and of scratch.

    Raises:
      UserError: Scratch has fewer, or all growths have.
    """
    sizes = {
        growth: len({num_params(end.model) for end in of_growth})
        for growth, of_growth in by_growth(ends).items()
    }
    enough = [growth for growth, count in sizes.items() if count >= 3]
    if "scratch" not in enough or len(enough) == 1:
        said = ", ".join(f"{name} is of {count}" for name, count in sizes.items())
        raise UserError(
            f"of sizes, {said}; a law of loss over compute needs three, of scratch and of a "
            f"growth, as ever more tokens for one size bring its loss to a floor."
        )
    return {
        growth: fit_power_law([end.flops for end in of_growth], [end.loss for end in of_growth])
        for growth, of_growth in by_growth(ends).items()
        if growth in enough
    }


def by_growth(ends: Sequence[End]) -> dict[str, list[End]]:
    """Returns the ends of each growth, scratch first."""
    names = sorted({end.growth for end in ends}, key=lambda name: (name != "scratch", name))
    return {name: [end for end in ends if end.growth == name] for name in names}


def gap_laws(pairs: Sequence[Pair]) -> dict[str, GapLaw]:
    """Returns the law of the gap over the tokens of scratch, of each growth and size.

    Of those that have three lengths. Grown runs that share a run from scratch are one point.

    Raises:
      UserError: None of them has.
    """
    found = {}
    for name, gaps in gap_points(pairs).items():
        if len({tokens for tokens, _ in gaps}) >= 3:
            found[name] = fit_gap(*zip(*gaps, strict=True))
    if not found:
        raise UserError(
            "no growth has runs of three lengths for one size, each with one from scratch for "
            "the same FLOPs; how a gap goes on with ever more tokens needs them."
        )
    return found


def gap_points(pairs: Sequence[Pair]) -> dict[str, list[tuple[int, float]]]:
    """Returns tokens of scratch and gaps, by growth and, where they are several, by size."""
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
