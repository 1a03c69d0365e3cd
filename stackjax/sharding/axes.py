"""Logical axis names of a parameter: the only schema that the rest of stackjax reads."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Axes:
    """The axis names of one array, in order: those it is stacked over, reads, and writes.

    `Axes(("layers",), ("embed",), ("heads", "head_dim"))` belongs to an array of shape
    [layers, embed, heads, head_dim]: per layer, a map that sums over `embed` and writes
    `heads` and `head_dim`.
    """

    stacked: tuple[str, ...] = ()
    """Axes along which independent maps are stacked."""
    reads: tuple[str, ...] = ()
    """Axes that the map sums over."""
    writes: tuple[str, ...] = ()
    """Axes of what the map returns."""

    @property
    def names(self) -> tuple[str, ...]:
        """The name of every axis of the array, in order."""
        return self.stacked + self.reads + self.writes

    def stack(self, name: str) -> "Axes":
        """Returns the axes of arrays stacked along a new leading axis."""
        return dataclasses.replace(self, stacked=(name, *self.stacked))
