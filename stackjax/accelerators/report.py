"""The report of `stackjax fit`: a table, notes and JSON."""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from stackjax.accelerators.bounds import FORMULA
from stackjax.accelerators.costs import Costs
from stackjax.accelerators.devices import DeviceGroup
from stackjax.accelerators.measure import Machine, Measured
from stackjax.runtime.text_table import aligned

_COLUMNS = {
    "program": "",
    "arguments": "GiB",
    "peak": "GiB",
    "left": "GiB",
    "type": "",
    "attention": "",
    "sync wire": "GB",
    "all wire": "GB",
    "FLOPs": "/ ours",
    ">= FLOPs": "s",
    ">= memory": "s",
    ">= wire": "s",
    "estimate": "s",
    "MFU": "%",
    "compiled": "s",
}
"""Columns and units; `>=` is a lower bound."""

_UNKNOWN = """\
Not known without a device: the real speed; every time above is a bound or an estimate."""
_UNKNOWN_GPU = """\
Not known without a GPU: the chosen matrix-product kernels (autotuning needs a GPU); memory
outside of the program: cuDNN's workspace for attention (130 to 481 MiB in trials), NCCL, and
the CUDA context."""


def table(rows: Sequence[Measured]) -> str:
    """Returns a table of programs."""
    return aligned([[*_COLUMNS], [*_COLUMNS.values()], *map(_cells, rows)], align=">")


def _cells(row: Measured) -> tuple[str, ...]:
    if row.costs is None or row.bounds is None or row.peak_bytes is None:
        compiled = f"{row.compile_seconds:.0f}"
        return (row.name, "-", "too large", *("-",) * (len(_COLUMNS) - 4), compiled)
    costs, bounds = row.costs, row.bounds
    executed = costs.dot_flops + costs.attention_flops
    return (
        row.name,
        _gib(row.argument_bytes),
        _gib(row.peak_bytes),
        _gib(row.usable_bytes - row.peak_bytes),
        row.compute_dtype or "-",
        row.attention or "-",
        f"{costs.wire_bytes(is_synchronous=True) / 1e9:.1f}",
        f"{sum(each.wire_bytes for each in costs.collectives) / 1e9:.1f}",
        "-" if row.model_flops is None else f"{executed / row.model_flops:.3f}",
        *(f"{value:.2f}" for value in (bounds.flops, bounds.memory, bounds.wire)),
        f"{bounds.estimate:.2f}",
        "-" if row.mfu is None else f"{100 * row.mfu:.0f}",
        f"{row.compile_seconds:.0f}",
    )


def _gib(num_bytes: int | None) -> str:
    return "-" if num_bytes is None else f"{num_bytes / 2**30:.2f}"


def notes(rows: Sequence[Measured]) -> str:
    """Returns the attention kernels and the collectives of each program."""
    return "\n".join(line for row in rows for line in _notes(row))


def _notes(row: Measured) -> list[str]:
    lines = []
    if row.refusal:
        lines.append(f"{row.name}: {row.refusal}")
    if row.attention:
        calls = "" if row.costs is None else f"; {row.costs.forward_kernels} forward kernels"
        reason = f"{row.attention} attention: {row.attention_reason}"
        lines.append(f"{row.name}: {reason}{calls}")
    return lines + ([] if row.costs is None else _collective_lines(row.name, row.costs))


def _collective_lines(name: str, costs: Costs) -> list[str]:
    lines = [
        f"{name}: {each.calls} {'synchronous' if each.is_synchronous else 'asynchronous'} "
        f"{each.kind}{' between hosts or slices' if each.crosses_hosts else ''}: "
        f"{each.wire_bytes / 1e9:.3g} GB"
        for each in costs.collectives
    ]
    if costs.host_bytes:
        lines.append(f"{name}: {costs.host_bytes / 1e9:.3g} GB to and from the host's memory")
    if costs.unknown_loops:
        lines.append(
            f"{name}: {costs.unknown_loops} loops without a known number of iterations count "
            f"once, so FLOPs, traffic and wire are lower bounds"
        )
    return lines


def report(config: str, machine: Machine, rows: Sequence[Measured]) -> str:
    """Returns the whole report."""
    unknown = _UNKNOWN if machine.group.is_tpu else f"{_UNKNOWN}\n{_UNKNOWN_GPU}"
    return "\n\n".join([title(config, machine), table(rows), notes(rows), FORMULA, unknown])


def title(config: str, machine: Machine) -> str:
    """Returns the report's first line: config, devices and their usable memory."""
    return (
        f"{config} on {machine.group}: {len(machine.devices)} x "
        f"{machine.devices[0].device_kind}, {_gib(machine.memory)} GiB usable on each; all "
        f"numbers are of one device"
    )


def to_json(config: str, group: DeviceGroup, rows: Sequence[Measured]) -> str:
    """Returns the report as JSON."""
    programs: list[dict[str, Any]] = [
        dataclasses.asdict(row) | {"fits": row.fits} for row in rows
    ]
    return json.dumps({"config": config, "devices": str(group), "programs": programs}, indent=1)
