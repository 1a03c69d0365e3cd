"""The report of `scale`: tables, figures and numbers."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from stackjax.analysis.plots import gap_figure, laws_figure, sign
from stackjax.analysis.reading import read_record
from stackjax.analysis.record import Record
from stackjax.analysis.report import write_report
from stackjax.analysis.run_ends import (
    End,
    Pair,
    by_growth,
    ends_of,
    gap_laws,
    gap_points,
    notes,
    pairs_of,
    power_laws,
)
from stackjax.analysis.scaling import GapLaw, Interval, PowerLaw, speedup
from stackjax.analysis.settings import provenance, trace
from stackjax.analysis.speedup import Speedup
from stackjax.analysis.tables import LOSSES, Table, provenance_table, show_speedup
from stackjax.model.flops import num_params
from stackjax.options import LossName, ScaleConfig
from stackjax.runtime.errors import UserError
from stackjax.runtime.numbers import short

BEYOND = (1, 10, 100, 1000)
"""Multiples of the largest run that laws are drawn out to."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Found:
    """The ends of runs, and what laws they follow."""

    records: list[Record]
    ends: list[End]
    pairs: list[Pair]
    laws: Mapping[str, PowerLaw] | str
    """By growth; or why there are none."""
    gaps: Mapping[str, GapLaw] | str


def write(config: ScaleConfig) -> str:
    """Writes what was found, and returns it as Markdown.

    Raises:
      UserError: The runs do not compare, or follow neither law.
    """
    found = find(config)
    flops = config.flops or tuple(times * found.ends[-1].flops for times in BEYOND)
    tables = [_ends_table(found, config.loss)]
    figures: dict[str, Figure] = {}
    if not isinstance(found.laws, str):
        tables += [_laws_table(found.laws), _foretold_table(found.laws, flops)]
        figures["laws"] = laws_figure(by_growth(found.ends), found.laws, max(flops))
    if not isinstance(found.gaps, str):
        lengths = _lengths(found.pairs)
        tables.append(_gaps_table(found.gaps, lengths))
        figures["gap"] = gap_figure(gap_points(found.pairs), found.gaps, lengths[-1])
    tables.append(provenance_table(found.records))
    missing = [why for why in (found.laws, found.gaps) if isinstance(why, str)]
    return write_report(
        config.output,
        "scale",
        title="Does growing pay at a larger scale?",
        said=[*(f"Not fitted: {why}" for why in missing), *notes(found.records)],
        figures={name: sign(each, trace(found.records)) for name, each in figures.items()},
        tables=tables,
        numbers=_plain(found, flops),
    )


def find(config: ScaleConfig) -> Found:
    """Returns the ends of runs, and their laws.

    Raises:
      UserError: The runs do not compare, or follow neither law.
    """
    records = [read_record(path) for path in config.runs]
    ends = ends_of(records, config.loss)
    pairs = pairs_of(ends)
    laws, gaps = _or_why(power_laws, ends), _or_why(gap_laws, pairs)
    if isinstance(laws, str) and isinstance(gaps, str):
        raise UserError(f"{laws} And {gaps}")
    return Found(records=records, ends=ends, pairs=pairs, laws=laws, gaps=gaps)


def _or_why(fit: Any, points: Sequence[Any]) -> Any:
    try:
        return fit(points)
    except UserError as error:
        return str(error)


def _lengths(pairs: Sequence[Pair]) -> list[float]:
    longest = max(pair.scratch.tokens for pair in pairs)
    return [float(times * longest) for times in BEYOND]


def _ends_table(found: Found, loss: LossName) -> Table:
    gaps: dict[End, list[float]] = {}
    for pair in found.pairs:
        gaps.setdefault(pair.grown, []).append(pair.gap)
    return Table(
        title="The ends of the runs",
        note="The gap is scratch's loss less that of the grown run, of the same model, FLOPs "
        "and seed: positive where growing wins.",
        head=[
            "parameters",
            "run",
            "seed",
            "tokens",
            "FLOPs (6ND)",
            LOSSES[loss],
            "gap",
            "directory",
        ],
        rows=[
            [
                short(num_params(end.model)),
                end.growth,
                str(end.seed),
                short(end.tokens),
                f"{end.flops:.3g}",
                f"{end.loss:.4f}",
                ", ".join(f"{gap:+.4f}" for gap in gaps.get(end, [])),
                end.path,
            ]
            for end in found.ends
        ],
    )


def _laws_table(laws: Mapping[str, PowerLaw]) -> Table:
    return Table(
        title="Loss over compute: L = a C^b",
        note="Least squares of log L over the ends of the runs, with 95 % intervals.",
        head=["run", "a", "b"],
        rows=[
            [name, _within(law.a, law.intervals["a"]), _within(law.b, law.intervals["b"])]
            for name, law in laws.items()
        ],
    )


def _foretold_table(laws: Mapping[str, PowerLaw], flops: Sequence[float]) -> Table:
    return Table(
        title="What the laws foretell",
        note="The speed-up at the loss that scratch has for these FLOPs. That the laws go on "
        "is taken for granted, and not in the intervals.",
        head=["run", "FLOPs (6ND)", "scratch's loss", "its own loss", "speed-up"],
        rows=[
            [
                name,
                f"{at:.3g}",
                _within(laws["scratch"](at), laws["scratch"].interval(at)),
                _within(law(at), law.interval(at)),
                _foretold(laws["scratch"], law, at),
            ]
            for name, law in laws.items()
            if name != "scratch"
            for at in flops
        ],
    )


def _foretold(scratch: PowerLaw, grown: PowerLaw, flops: float) -> str:
    estimate = speedup(scratch, grown, flops)
    return show_speedup(Speedup(loss=scratch(flops), is_bound="", estimate=estimate))


def _gaps_table(gaps: Mapping[str, GapLaw], lengths: Sequence[float]) -> Table:
    return Table(
        title="The gap over tokens: p + q log10 D",
        note="Least squares over pairs of runs, with 95 % intervals; D is the tokens of "
        "scratch. That the line goes on is taken for granted, and not in the intervals.",
        head=["run", "q", *(f"gap at {short(length)} tokens" for length in lengths)],
        rows=[
            [
                name,
                _within(law.q, law.intervals["q"]),
                *(_within(law(length), law.interval(length)) for length in lengths),
            ]
            for name, law in gaps.items()
        ],
    )


def _within(value: float, interval: Interval) -> str:
    low, high = interval
    return f"{value:.4g} ({low:.4g} to {high:.4g})"


def _plain(found: Found, flops: Sequence[float]) -> dict[str, Any]:
    """Returns all that was found, for machines; what is not known is null."""
    laws = {} if isinstance(found.laws, str) else found.laws
    gaps = {} if isinstance(found.gaps, str) else found.gaps
    return {
        "notes": notes(found.records),
        "provenance": provenance(found.records),
        "charged": {
            str(record.path): dataclasses.asdict(record.charge)
            for record in found.records
            if record.origin
        },
        "ends": [dataclasses.asdict(end) for end in found.ends],
        "laws": {
            name: {"a": law.a, "b": law.b, "intervals": law.intervals}
            for name, law in laws.items()
        },
        "foretold": [
            {"run": name, "flops": at} | dataclasses.asdict(speedup(laws["scratch"], law, at))
            for name, law in laws.items()
            if name != "scratch"
            for at in flops
        ],
        "gaps": {
            name: {"p": law.p, "q": law.q, "intervals": law.intervals}
            for name, law in gaps.items()
        },
        "gaps_foretold": [
            {"run": name, "tokens": at, "gap": law(at), "interval": law.interval(at)}
            for name, law in gaps.items()
            for at in _lengths(found.pairs)
        ],
    }
