"""Reports on scaling laws."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from stackjax.analysis.names import LOSSES
from stackjax.analysis.plots import gap_figure, laws_figure, sign
from stackjax.analysis.reading import read_record
from stackjax.analysis.report import write_report
from stackjax.analysis.run_ends import (
    End,
    Laws,
    Pair,
    by_growth,
    fit_laws,
    gap_points,
    notes,
)
from stackjax.analysis.scaling import GapLaw, Interval, PowerLaw, speedup
from stackjax.analysis.settings import provenance, trace
from stackjax.analysis.speedup import Speedup
from stackjax.analysis.tables import Table, provenance_table, show_speedup
from stackjax.files.output import check_output_directory
from stackjax.model.flops import num_params
from stackjax.options import LossName, ScaleConfig
from stackjax.runtime.numbers import short

MULTIPLES = (1, 10, 100, 1000)
"""Predictions are for these multiples of the largest compute."""


def write(config: ScaleConfig) -> str:
    """Writes the scaling laws, and returns them as Markdown.

    Raises:
      UserError: The runs are not comparable, they suffice for no law, or the output directory
        is not writable.
    """
    check_output_directory("--output", config.output)
    found = fit_laws([read_record(path) for path in config.runs], config.loss)
    flops = config.flops or [times * found.ends[-1].flops for times in MULTIPLES]
    tables = [_ends_table(found, config.loss)]
    figures: dict[str, Figure] = {}
    if not isinstance(found.power_laws, str):
        tables += [_laws_table(found.power_laws), _predictions_table(found.power_laws, flops)]
        figures["laws"] = laws_figure(by_growth(found.ends), found.power_laws, max(flops))
    if not isinstance(found.gap_laws, str):
        lengths = _lengths(found.pairs)
        tables.append(_gaps_table(found.gap_laws, lengths))
        figures["gap"] = gap_figure(gap_points(found.pairs), found.gap_laws, lengths[-1])
    tables.append(provenance_table(found.records))
    missing = [why for why in (found.power_laws, found.gap_laws) if isinstance(why, str)]
    return write_report(
        config.output,
        "scale",
        title="Does growing pay at a larger scale?",
        said=[*(f"Not fitted: {why}" for why in missing), *notes(found.records)],
        figures={name: sign(each, trace(found.records)) for name, each in figures.items()},
        tables=tables,
        numbers=_numbers(found, flops),
    )


def _lengths(pairs: Sequence[Pair]) -> list[float]:
    longest = max(pair.scratch.tokens for pair in pairs)
    return [float(times * longest) for times in MULTIPLES]


def _ends_table(found: Laws, loss: LossName) -> Table:
    gaps: dict[End, list[float]] = {}
    for pair in found.pairs:
        gaps.setdefault(pair.grown, []).append(pair.gap)
    return Table(
        title="Final losses",
        note="The gap is scratch's loss minus the grown run's loss, at equal model, FLOPs and "
        "seed. A positive gap means growing wins.",
        head=[
            *("parameters", "run", "seed", "tokens", "FLOPs (6ND)"),
            *(LOSSES[loss], "gap", "directory"),
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
        note="Least squares of log L over final losses, with 95 % intervals.",
        head=["run", "a", "b"],
        rows=[
            [name, _within(law.a, law.intervals["a"]), _within(law.b, law.intervals["b"])]
            for name, law in laws.items()
        ],
    )


def _predictions_table(laws: Mapping[str, PowerLaw], flops: Sequence[float]) -> Table:
    return Table(
        title="Extrapolated speed-up",
        note="Speed-up at scratch's loss for these FLOPs. The intervals assume that the laws "
        "hold beyond the data.",
        head=["run", "FLOPs (6ND)", "scratch's loss", "its own loss", "speed-up"],
        rows=[
            [
                name,
                f"{at:.3g}",
                _within(laws["scratch"](at), laws["scratch"].interval(at)),
                _within(law(at), law.interval(at)),
                _predicted_speedup(laws["scratch"], law, at),
            ]
            for name, law in laws.items()
            if name != "scratch"
            for at in flops
        ],
    )


def _predicted_speedup(scratch: PowerLaw, grown: PowerLaw, flops: float) -> str:
    estimate = speedup(scratch, grown, flops)
    return show_speedup(Speedup(loss=scratch(flops), is_bound="", estimate=estimate))


def _gaps_table(gaps: Mapping[str, GapLaw], lengths: Sequence[float]) -> Table:
    return Table(
        title="The gap over tokens: p + q log10 D",
        note="Least squares over pairs of runs, with 95 % intervals. D is scratch's tokens. "
        "The intervals assume that the line holds beyond the data.",
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


def _numbers(found: Laws, flops: Sequence[float]) -> dict[str, Any]:
    """Returns the JSON content; unknown numbers are null."""
    laws = {} if isinstance(found.power_laws, str) else found.power_laws
    gaps = {} if isinstance(found.gap_laws, str) else found.gap_laws
    return {
        "notes": notes(found.records),
        "provenance": provenance(found.records),
        "charged": {
            str(record.path): record.charge_numbers for record in found.records if record.origin
        },
        "ends": [dataclasses.asdict(end) for end in found.ends],
        "laws": {
            name: {"a": law.a, "b": law.b, "intervals": law.intervals}
            for name, law in laws.items()
        },
        "predicted": [
            {"run": name, "flops": at} | dataclasses.asdict(speedup(laws["scratch"], law, at))
            for name, law in laws.items()
            if name != "scratch"
            for at in flops
        ],
        "gaps": {
            name: {"p": law.p, "q": law.q, "intervals": law.intervals}
            for name, law in gaps.items()
        },
        "predicted_gaps": [
            {"run": name, "tokens": at, "gap": law(at), "interval": law.interval(at)}
            for name, law in gaps.items()
            for at in _lengths(found.pairs)
        ],
    }
