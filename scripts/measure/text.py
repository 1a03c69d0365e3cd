"""Formats numbers by the unit at the end of their name."""

import math
from collections.abc import Mapping
from typing import Any


def show(name: str, value: Any) -> str:
    """Returns a value with the unit at the end of the name."""
    if isinstance(value, Mapping):
        return f"not measured: {value['not_measured']}"
    if not isinstance(value, int | float):
        return str(value)
    if name.endswith("_seconds"):
        return _scaled(value, {1.0: "s", 1e-3: "ms", 1e-6: "us"})
    if name.endswith("_bytes_per_second"):
        return f"{value / 1e9:.3g} GB/s"
    if name.endswith("_flops_per_second"):
        return _scaled(value, {1e12: "TFLOP/s", 1e9: "GFLOP/s"})
    if name.endswith("_bytes"):
        return _scaled(value, {2.0**30: "GiB", 2.0**20: "MiB", 2.0**10: "KiB"})
    if name.endswith("flops"):
        return f"{value:.4g}"
    if name.endswith("tokens_per_second"):
        return f"{value:,.0f}"
    if name.endswith(("mfu", "share", "of_step")):
        return f"{100 * value:.3g} %"
    return f"{value:,.3g}" if isinstance(value, float) else f"{value:,}"


def _scaled(value: float, units: Mapping[float, str]) -> str:
    """Returns a value in the largest unit with a value of at least 1."""
    size = next((size for size in units if abs(value) >= size), min(units))
    digits = max(0, 2 - math.floor(math.log10(abs(value / size)))) if value else 0
    return f"{value / size:,.{digits}f} {units[size]}"


def lines(row: Mapping[str, Any]) -> str:
    """Returns a row of results as lines with name and value."""
    head = " ".join(part for part in (row["phase"], row["section"], row["case"]) if part)
    values = row["values"]
    if "not_measured" in values:
        return f"{head:<32}{show('', values)}"
    return "\n".join(
        [head, *(f"  {name:<30}{show(name, value)}" for name, value in values.items())]
    )
