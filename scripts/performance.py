"""Writes the tables in docs/performance.md from files of the benchmarks.

    python -m scripts.performance runs/performance/*.json

`scripts/performance.sh` makes all measurements first.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from scripts.measure.machine import VARIABLES
from scripts.measure.text import show
from scripts.page import replace_table
from stackjax.analysis.throughput import read_rows
from stackjax.files.json_file import Fields, decode, read_object
from stackjax.runtime.command_line import parse
from stackjax.runtime.constraints import Checked
from stackjax.runtime.errors import UserError, one_line_errors
from stackjax.runtime.ranges import Length
from stackjax.runtime.text_table import markdown_table

Report = Mapping[str, Any]
"""A JSON file's content, with the stem as `name`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PerformanceConfig(Checked):
    """Writes a page's tables from files of scripts.benchmark."""

    results: Annotated[tuple[Path, ...], tyro.conf.Positional, Length(at_most=1000)]
    """JSON files of scripts.benchmark; the tables use the file names."""
    page: Path = Path("docs/performance.md")
    """Page whose tables are replaced."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
    """A table with a line for each row in a section."""

    section: str
    columns: Mapping[str, str]
    """By heading, `section.field` in the same phase."""
    on: Callable[[Report], bool] = lambda report: True
    """Filter for reports."""


_FIELDS = dict.fromkeys(("command", "date", "platform", "device_kind", "cpu", *VARIABLES), str)
_FIELDS |= {"versions": dict, "num_devices": int}
"""A report's fields besides rows, with types."""


def _on_cpu(report: Report) -> bool:
    return report["platform"] == "cpu"


_STEP = {
    "parameters": "model.params",
    "tokens a step": "model.tokens_per_step",
    "step": "step.median_seconds",
    "p10": "step.p10_seconds",
    "p90": "step.p90_seconds",
    "back to back": "step.back_to_back_seconds",
    "tokens/s": "step.tokens_per_second",
    "6N + 12LTD": "step.palm_flops_per_second",
}
_MEMORY = {
    "compile": "compile.compile_seconds",
    "temporary": "compile.temporary_bytes",
}
TABLES = {
    "steps": Table(
        section="step",
        columns=_STEP
        | {"of a matrix product": "step.matmul_share"}
        | _MEMORY
        | {"peak of the process": "step.host_peak_bytes"},
        on=_on_cpu,
    ),
    "accelerators": Table(
        section="step",
        columns=_STEP
        | {"MFU": "step.mfu", "causal MFU": "step.causal_mfu"}
        | _MEMORY
        | {"peak of the device": "step.device_peak_bytes"},
        on=lambda report: not _on_cpu(report),
    ),
    "flops": Table(
        section="flops",
        columns={
            "6ND": "flops.six_nd_flops",
            "matrix products": "flops.matmul_flops",
            "6N + 12LTD": "flops.palm_flops",
            "causal": "flops.palm_causal_flops",
            "XLA": "flops.xla_flops",
            "XLA, scans once": "compile.xla_scanned_flops",
        },
    ),
    "choices": Table(
        section="choice",
        columns={
            "step": "choice.median_seconds",
            "temporary": "choice.temporary_bytes",
            "compile": "choice.compile_seconds",
        },
    ),
    "growth": Table(
        section="growth",
        columns={
            "grown": "growth.grown_bytes",
            "first": "growth.first_seconds",
            "median": "growth.median_seconds",
            "copy": "growth.copy_seconds",
            "copies": "growth.copies",
            "source and result": "growth.program_bytes",
            "compile": "growth.compile_seconds",
            "peak of the process": "growth.host_peak_bytes",
            "peak of the device": "growth.device_peak_bytes",
        },
    ),
    "checkpoints": Table(
        section="checkpoint",
        columns={
            "state": "checkpoint.state_bytes",
            "stall": "checkpoint.stall_seconds",
            "longest": "checkpoint.longest_stall_seconds",
            "on disk after": "checkpoint.on_disk_seconds",
            "restore": "checkpoint.restore_seconds",
        },
    ),
    "loader": Table(
        section="loader",
        columns={
            "loader tokens/s": "loader.tokens_per_second",
            "shards": "loader.source",
            "step tokens/s": "step.tokens_per_second",
        },
    ),
    "mixtures": Table(
        section="mixtures",
        columns={
            "loader tokens/s": "mixtures.tokens_per_second",
            "a second of CPU time": "mixtures.cpu_tokens_per_second",
            "of one source": "mixtures.of_one_source",
        },
    ),
    "preparation": Table(
        section="preparation",
        columns={
            "texts": "preparation.text_bytes",
            "prepare": "preparation.prepare_seconds",
            "encode_batch": "preparation.encode_batch_seconds",
            "speed": "preparation.speed",
            "in CPU time": "preparation.cpu_speed",
        },
    ),
    "inference": Table(
        section="inference",
        columns={
            "forward pass": "inference.forward_seconds",
            "scored": "inference.scored_seconds",
            "forward passes": "inference.forward_passes",
            "scored tokens/s": "inference.scored_tokens_per_second",
            "a token for all rows": "inference.decode_seconds",
            "written tokens/s": "inference.decoded_tokens_per_second",
        },
    ),
    "ahead": Table(
        section="ahead",
        columns={
            "step": "ahead.step_seconds",
            "meanwhile": "ahead.meanwhile_seconds",
            "compile": "ahead.compile_seconds",
            "compile meanwhile": "ahead.compile_meanwhile_seconds",
            "saved": "ahead.saved_seconds",
        },
    ),
    "host": Table(
        section="host",
        columns={
            "in the loop": "host.loop_seconds",
            "bare": "host.bare_seconds",
            "overhead": "host.overhead_seconds",
            "of this step": "host.share_of_step",
            "sending a batch": "host.put_seconds",
        },
    ),
}


def main() -> None:
    """Runs the command line."""
    with one_line_errors():
        write(parse(PerformanceConfig, prog="python -m scripts.performance"))


def write(options: PerformanceConfig) -> None:
    """Replaces every table of the page; UserError if a file is damaged."""
    reports = [_read(path) for path in options.results]
    texts = {name: _text(table, reports) for name, table in TABLES.items()}
    for name, table in {"machines": machines(reports), **texts}.items():
        replace_table(options.page, name, table)


def _read(path: Path) -> Report:
    return read_object(path, "name a file of scripts.benchmark", _report) | {
        "path": path,
        "name": path.stem,
    }


def _report(fields: Fields) -> Fields:
    """Returns a report's fields; UserError if fields are missing or have wrong types."""
    for name, kind in _FIELDS.items():
        decode(kind, fields.get(name), name)
    machine = [row.values for row in read_rows(fields) if row.section == "machine"]
    for name in ("matmul_flops_per_second", "copy_bytes_per_second"):
        decode(float, machine[0].get(name) if machine else None, name)
    return fields


def machines(reports: Sequence[Report]) -> str:
    """Returns commands, machines and versions."""
    lines = []
    for report in reports:
        versions = ", ".join(f"{name} {of}" for name, of in report["versions"].items())
        variables = [f"{name}={report[name]!r}" for name in VARIABLES if report[name]]
        machine = next(row["values"] for row in report["rows"] if row["section"] == "machine")
        rates = (
            f"{show('_flops_per_second', machine['matmul_flops_per_second'])} in a product of "
            f"matrices, {show('_bytes_per_second', machine['copy_bytes_per_second'])} copied"
        )
        lines += [
            f"- **{report['name']}**: `{report['command']}`, {report['date']}",
            f"  - {report['num_devices']} x {report['device_kind']} ({rates}), on "
            f"{report.get('num_cores')} cores of {report['cpu']}",
            f"  - {versions}; {'; '.join(variables) or 'no flags'}",
        ]
    return "\n".join(lines)


def _text(table: Table, reports: Sequence[Report]) -> str:
    """Returns a table in Markdown, or a line if nothing was measured."""
    shown = [
        [_label(report, row), *_cells(table, report, row)]
        for report in filter(table.on, reports)
        for row in report["rows"]
        if row["section"] == table.section
    ]
    return markdown_table(["", *table.columns], shown) if shown else "not measured"


def _label(report: Report, row: Mapping[str, Any]) -> str:
    phase = row["phase"].removesuffix("/train")
    return " ".join(part for part in (report["name"], phase, row["case"]) if part)


def _cells(table: Table, report: Report, row: Mapping[str, Any]) -> Iterator[str]:
    """Yields a line's cells; repeated reasons for missing numbers are left out."""
    given = set()
    for path in table.columns.values():
        section, field = path.split(".")
        of = row if section == row["section"] else _find(report, section, row["phase"])
        value = of["values"].get(field, of["values"])
        if isinstance(value, Mapping) and "not_measured" not in value:
            raise UserError(
                f"{report['path']} is damaged: {path} is missing for {row['phase']!r}; measure "
                f"again with scripts.benchmark."
            )
        text = show(field, value)
        yield "" if text in given else text
        if isinstance(value, Mapping):
            given.add(text)


def _find(report: Report, section: str, phase: str) -> Mapping[str, Any]:
    """Returns the row for a section and phase."""
    reason = {"not_measured": f"{section} was not among the sections"}
    found = (r for r in report["rows"] if (r["section"], r["phase"]) == (section, phase))
    return next(found, {"values": reason})


if __name__ == "__main__":
    main()
