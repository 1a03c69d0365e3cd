"""Metrics of a run by source, such as `epochs/web`."""

from collections.abc import Mapping, Sequence
from typing import TypeVar

T = TypeVar("T")


def by_source(metric: str, sources: Sequence[str]) -> tuple[str, ...]:
    """Returns a metric's name for each source; the plain name for a single source."""
    if len(sources) == 1:
        return (metric,)
    return tuple(f"{metric}/{source}" for source in sources)


def of_sources(metric: str, values: Mapping[str, T]) -> dict[str, T]:
    """Returns a metric by source, from values by metric name; empty for a single source."""
    prefix = f"{metric}/"
    return {
        name.removeprefix(prefix): value
        for name, value in values.items()
        if name.startswith(prefix)
    }
