"""The ends of runs of many sizes and lengths, and the laws through them."""

import dataclasses
from collections.abc import Sequence

from stackjax.analysis.record import LossName, Record, check_comparable
from stackjax.analysis.scaling import GapLaw, PowerLaw, fit_gap, fit_power_law
from stackjax.flops import num_params
from stackjax.model import ModelConfig

_SAME_FLOPS = 0.03
"""How far the FLOPs of two runs may differ that count as equal: they end with whole steps."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class End:
    """A run at its end."""

    growth: str
    """How its model has grown, or "scratch"."""
    model: ModelConfig
    seed: int
    tokens: int
    """Of all stages."""
    flops: float
    """By 6ND, of all stages."""
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
      ValueError: Their losses do not mean the same, but for the size of the last model.
    """
    check_comparable(records, any_size=True)
    found = []
    for record in records:
        curve = record.curve(loss)
        grown = [str(growth) for growth in record.growths if growth is not None]
        end = End(
            growth=", ".join(grown) or "scratch",
            model=record.final_model,
            seed=record.config["seed"],
            tokens=int(curve.costs["tokens"][-1]),
            flops=float(curve.costs["flops_6nd"][-1]),
            loss=float(curve.losses[-1]),
        )
        found.append(end)
    return sorted(found, key=lambda end: end.flops)


def pairs_of(ends: Sequence[End]) -> list[Pair]:
    """Returns the pairs of a grown run and one from scratch, for the same FLOPs."""
    scratch = [end for end in ends if end.growth == "scratch"]
    return [
        Pair(scratch=other, grown=end)
        for end in ends
        if end.growth != "scratch"
        for other in scratch
        if (other.model, other.seed) == (end.model, end.seed)
        and abs(other.flops - end.flops) <= _SAME_FLOPS * end.flops
    ]


def power_laws(ends: Sequence[End]) -> dict[str, PowerLaw]:
    """Returns the law of loss over FLOPs of each growth, and of scratch.

    Raises:
      ValueError: There are too few runs of one, or all of a size.
    """
    sizes = sorted({num_params(end.model) for end in ends})
    if len(sizes) < 3:
        raise ValueError(
            f"the runs are of {len(sizes)} sizes; a law of loss over compute needs three, as "
            f"ever more tokens for one size bring its loss to a floor."
        )
    return {
        growth: fit_power_law([end.flops for end in of_growth], [end.loss for end in of_growth])
        for growth, of_growth in by_growth(ends).items()
    }


def by_growth(ends: Sequence[End]) -> dict[str, list[End]]:
    """Returns the ends of each growth, scratch first."""
    names = sorted({end.growth for end in ends}, key=lambda name: (name != "scratch", name))
    return {name: [end for end in ends if end.growth == name] for name in names}


def gap_laws(pairs: Sequence[Pair]) -> dict[str, GapLaw]:
    """Returns the law of the gap over the tokens of scratch, of each growth.

    Raises:
      ValueError: There are fewer than three lengths, or several sizes.
    """
    sizes = {num_params(pair.grown.model) for pair in pairs}
    if len(sizes) != 1:
        raise ValueError(
            f"the pairs of runs for equal FLOPs are of {len(sizes)} sizes; how a gap goes on "
            f"with ever more tokens shows at one size."
        )
    found = {}
    for growth in dict.fromkeys(pair.grown.growth for pair in pairs):
        of_growth = [pair for pair in pairs if pair.grown.growth == growth]
        tokens = [pair.scratch.tokens for pair in of_growth]
        found[growth] = fit_gap(tokens, [pair.gap for pair in of_growth])
    return found
