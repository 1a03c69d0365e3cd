"""How one axis of a model grows: the source index of every target index."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from stackjax.sharding.axes import Axes


@dataclasses.dataclass(frozen=True)
class AxisMap:
    """The source index of every index of an axis that has grown, counted from 0."""

    sources: tuple[int, ...]

    @functools.cached_property
    def copy(self) -> np.ndarray:
        """Which copy of its source every index is, from 0."""
        seen: dict[int, int] = {}
        copies = []
        for source in self.sources:
            copies.append(seen.get(source, 0))
            seen[source] = copies[-1] + 1
        return np.array(copies)

    @functools.cached_property
    def num_copies(self) -> np.ndarray:
        """Of how many copies of its source every index is one."""
        return np.bincount(self.sources)[list(self.sources)]

    @property
    def is_new(self) -> np.ndarray:
        """Whether an index is another copy of a source that was there before it."""
        return self.copy > 0

    def after(self, first: "AxisMap") -> "AxisMap":
        """Returns the map of growing by `first`, then by this one."""
        return AxisMap(tuple(first.sources[i] for i in self.sources))


def gather(leaf: jax.Array, names: Axes, maps: Mapping[str, AxisMap]) -> jax.Array:
    """Returns the array with all of its axes grown."""
    for axis, name in enumerate(names.names):
        if name in maps:
            copies = _take if name in names.stacked else _join_runs
            leaf = copies(leaf, maps[name].sources, axis)
    return leaf


def _take(leaf: jax.Array, sources: Sequence[int], axis: int) -> jax.Array:
    # As fast as memory, which no number of slices put together is.
    return jnp.take(leaf, np.array(sources), axis=axis, mode="clip")


def _join_runs(leaf: jax.Array, sources: Sequence[int], axis: int) -> jax.Array:
    # Taken from an axis that devices share, the whole axis would come to each of them.
    runs = _consecutive_runs(sources)
    parts = [jax.lax.slice_in_dim(leaf, *run, axis=axis) for run in runs]
    return jnp.concatenate(parts, axis=axis)


def gather_tree(tree: Any, axes: Any, maps: Mapping[str, AxisMap]) -> Any:
    """Returns a tree of arrays with all of their axes grown."""
    return jax.tree.map(lambda leaf, names: gather(leaf, names, maps), tree, axes)


def along(values: Any, axis: int, rank: int) -> jax.Array:
    """Returns a vector as an array of `rank` axes that lies along one of them."""
    return jnp.expand_dims(jnp.asarray(values), [i for i in range(rank) if i != axis])


def is_new(names: Axes, maps: Mapping[str, AxisMap]) -> jax.Array:
    """Returns which entries of a parameter the source does not have.

    Booleans that broadcast against the parameter of the target.
    """
    rank = len(names.names)
    new = jnp.zeros((1,) * rank, bool)
    for axis, name in enumerate(names.names):
        if name in maps:
            new |= along(maps[name].is_new, axis, rank)
    return new


def new_indices(maps: Mapping[str, AxisMap]) -> dict[str, np.ndarray]:
    """Returns which indices of every axis that grows the source does not have."""
    return {axis: axis_map.is_new for axis, axis_map in maps.items()}


def zero_new(tree: Any, axes: Any, maps: Mapping[str, AxisMap]) -> Any:
    """Returns grown arrays in which everything is zero that the source does not have."""
    return jax.tree.map(
        lambda leaf, names: jnp.where(is_new(names, maps), jnp.zeros_like(leaf), leaf),
        tree,
        axes,
    )


def _consecutive_runs(indices: Sequence[int]) -> list[tuple[int, int]]:
    """Returns (start, stop) of the runs of consecutive numbers that make up `indices`."""
    runs: list[tuple[int, int]] = []
    for index in indices:
        if runs and runs[-1][1] == index:
            runs[-1] = (runs[-1][0], index + 1)
        else:
            runs.append((index, index + 1))
    return runs
