"""Results: numbers with units in their names, or reasons for missing numbers."""

import dataclasses
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np


@dataclasses.dataclass(frozen=True)
class NotMeasured:
    """Why there is no number."""

    not_measured: str


Number = float | NotMeasured


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """A measurement in a phase."""

    section: str
    """Name of the measurement."""
    phase: str = ""
    """The phase's directory, such as `stage_1/train`; empty for the whole machine."""
    case: str = ""
    """Variant, if the section has several."""
    values: Any
    """A dataclass whose fields carry their units, or `NotMeasured`."""


class CannotMeasure(Exception):
    """A measurement is impossible on this machine, with the reason."""


def attempt(measure: Callable[[], Any]) -> Any:
    """Returns a measurement, or the reason if it is impossible.

    Bugs are raised.
    """
    try:
        return measure()
    except (CannotMeasure, OSError) as error:
        return NotMeasured(str(error))
    except jax.errors.JaxRuntimeError as error:  # Out of memory, or no such kernel.
        return NotMeasured(str(error).splitlines()[0])


def seconds_of(call: Callable[[], Any]) -> tuple[float, Any]:
    """Returns a call's duration until all arrays are ready, and the result."""
    start = time.perf_counter()
    result = jax.block_until_ready(call())
    return time.perf_counter() - start, result


def median(seconds: list[float]) -> float:
    """Returns the median."""
    return float(np.median(seconds))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Peaks:
    """Peak memory since the process started."""

    device_bytes: int | None
    """Fullest local device; None if the backend does not count."""
    host_bytes: int
    """Resident in this process."""


def read_peaks() -> Peaks:
    """Returns the peaks so far."""
    statistics = [device.memory_stats() or {} for device in jax.local_devices()]
    on_device = [
        each["peak_bytes_in_use"] for each in statistics if "peak_bytes_in_use" in each
    ]
    unit = 1 if sys.platform == "darwin" else 1024
    return Peaks(
        device_bytes=max(on_device, default=None),
        host_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit,
    )


def peaks_since(before: Peaks) -> dict[str, Number]:
    """Returns `device_peak_bytes` and `host_peak_bytes` since `before`.

    Peaks cannot be reset, so a higher earlier peak means no number.
    """

    def risen(before: int | None, now: int | None) -> Number:
        if before is None or now is None:
            return NotMeasured("this backend does not count the memory of its devices")
        if now > before:
            return now
        return NotMeasured(f"at most the {now / 2**30:.2f} GiB of what was measured before")

    now = read_peaks()
    return {
        "device_peak_bytes": risen(before.device_bytes, now.device_bytes),
        "host_peak_bytes": risen(before.host_bytes, now.host_bytes),
    }
