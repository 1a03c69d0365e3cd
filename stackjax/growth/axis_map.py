"""Axis maps: the source index for each target index along a growing axis."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from stackjax.sharding.axes import Axes

T = TypeVar("T")

NEW = -1
"""The source index of a new index without a source."""


@dataclasses.dataclass(frozen=True)
class AxisMap:
    """The source index, counted from 0, for each index of a grown axis.

    `NEW` is for an index without a source, possible only along stacked axes.
    """

    sources: tuple[int, ...]

    @functools.cached_property
    def copy(self) -> np.ndarray:
        """The copy number of each index: 0 for a source's first copy, 1 for the second."""
        seen = {NEW: 1}
        copies = []
        for source in self.sources:
            copies.append(seen.get(source, 0))
            seen[source] = copies[-1] + 1
        return np.array(copies)

    @functools.cached_property
    def num_copies(self) -> np.ndarray:
        """The total number of copies of each index's source."""
        return np.bincount(self.sources)[list(self.sources)]

    @property
    def is_new(self) -> np.ndarray:
        """A mask of all indices besides the first copy of each source."""
        return self.copy > 0

    def after(self, first: "AxisMap") -> "AxisMap":
        """Returns the map for growth by `first`, then by this map."""
        return AxisMap(self.pick(first.sources, NEW))

    def pick(self, values: Any, without_source: T) -> tuple[T, ...]:
        """Returns the value of each index's source."""
        return tuple(without_source if i == NEW else values[i] for i in self.sources)


def gather(leaf: jax.Array, names: Axes, maps: Mapping[str, AxisMap]) -> jax.Array:
    """Returns an array with all axes grown."""
    for axis, name in enumerate(names.names):
        if name in maps:
            copies = _take if name in names.stacked else _join_runs
            leaf = copies(leaf, maps[name].sources, axis)
    return leaf


def _take(leaf: jax.Array, sources: Sequence[int], axis: int) -> jax.Array:
    indices = np.array(sources)
    if NEW in sources:
        # Zeros above all old entries, for entries without a source.
        widths = [(0, int(i == axis)) for i in range(leaf.ndim)]
        indices = np.where(indices == NEW, leaf.shape[axis], indices)
        leaf = jnp.pad(leaf, widths)
    # Runs at memory bandwidth; concatenated slices are slower.
    return jnp.take(leaf, indices, axis=axis, mode="clip")


def _join_runs(leaf: jax.Array, sources: Sequence[int], axis: int) -> jax.Array:
    # On a sharded axis, `jnp.take` would gather the whole axis on each device.
    runs = _consecutive_runs(sources)
    parts = [jax.lax.slice_in_dim(leaf, *run, axis=axis) for run in runs]
    return jnp.concatenate(parts, axis=axis)


def gather_tree(tree: Any, axes: Any, maps: Mapping[str, AxisMap]) -> Any:
    """Returns a tree of arrays with all axes grown."""
    return jax.tree.map(lambda leaf, names: gather(leaf, names, maps), tree, axes)


def along(values: Any, axis: int, rank: int) -> jax.Array:
    """Returns a vector as an array with `rank` axes, along `axis`; other axes have size 1."""
    return jnp.expand_dims(jnp.asarray(values), [i for i in range(rank) if i != axis])


def is_new(names: Axes, maps: Mapping[str, AxisMap]) -> jax.Array:
    """Returns a mask of a parameter's new entries.

    Booleans that broadcast against the target parameter.
    """
    rank = len(names.names)
    new = jnp.zeros((1,) * rank, bool)
    for axis, name in enumerate(names.names):
        if name in maps:
            new |= along(maps[name].is_new, axis, rank)
    return new


def new_indices(maps: Mapping[str, AxisMap]) -> dict[str, np.ndarray]:
    """Returns a mask of new indices for each growing axis."""
    return {axis: axis_map.is_new for axis, axis_map in maps.items()}


def zero_new(tree: Any, axes: Any, maps: Mapping[str, AxisMap]) -> Any:
    """Returns grown arrays with zeros in all new entries."""
    return jax.tree.map(
        lambda leaf, names: jnp.where(is_new(names, maps), jnp.zeros_like(leaf), leaf),
        tree,
        axes,
    )


def _consecutive_runs(indices: Sequence[int]) -> list[tuple[int, int]]:
    """Returns (start, stop) for each run of consecutive numbers in `indices`."""
    runs: list[tuple[int, int]] = []
    for index in indices:
        if runs and runs[-1][1] == index:
            runs[-1] = (runs[-1][0], index + 1)
        else:
            runs.append((index, index + 1))
    return runs
