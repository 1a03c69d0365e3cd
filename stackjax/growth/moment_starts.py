"""Moment starts: update counts at which moment entries begin to average gradients.

Adam and Muon divide a moment by 1 - decay^k after k updates. Growth and released layers set
moments to zero, but the optimizer continues to count. Without moment starts, k would be too
large: at b2 0.999, steps would be up to 6.6 times too long.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from stackjax.growth.axis_map import along
from stackjax.growth.base import Growth
from stackjax.model.config import ModelConfig, layers_along
from stackjax.sharding.axes import LAYER_AXES, Axes


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True, kw_only=True)
class MomentStarts:
    """The optimizer's update count when each entry's moments start.

    An entry starts at the latest count among the entry's indices. Axes without counts start
    with the optimizer. A pytree: all counts are inputs to a compiled step.
    """

    axes: tuple[tuple[str, Sequence[int] | jax.Array], ...] = ()
    """A count for each index, by axis name."""
    embedding: int | jax.Array = 0
    """The count for the whole embedding, because only the embedding may be frozen."""

    def tree_flatten(self) -> tuple[tuple[Any, ...], tuple[str, ...]]:
        """Returns the counts as arrays, and the axis names."""
        counts = (*(numbers for _, numbers in self.axes), self.embedding)
        return tuple(map(_int32, counts)), tuple(axis for axis, _ in self.axes)

    @classmethod
    def tree_unflatten(cls, axes: tuple[str, ...], counts: Sequence[Any]) -> "MomentStarts":
        """Returns the moment starts with these axis names and counts."""
        return cls(axes=tuple(zip(axes, counts[:-1], strict=True)), embedding=counts[-1])

    def correction(self, names: Axes, decay: float, count: jax.Array) -> jax.Array:
        """Returns 1 - decay^k for each entry in a parameter, k updates after the start.

        Args:
          count: Updates by the optimizer; an int32 scalar.
        """
        # The latest start has the smallest correction. Vectors are enough: they broadcast.
        corrections = [1 - decay ** (count - start) for start in self._of(names)]
        return functools.reduce(jnp.minimum, corrections)

    def _of(self, names: Axes) -> list[jax.Array]:
        rank = len(names.names)
        whole = self.embedding if names.reads == ("vocab",) else 0
        starts = [jnp.reshape(_int32(whole), (1,) * rank)]
        for axis, numbers in self.axes:
            if axis in names.names:
                starts.append(along(_int32(numbers), names.names.index(axis), rank))
        return starts

    def after_growth(
        self, growth: Growth, source: ModelConfig, now: int, *, keeps: bool
    ) -> "MomentStarts":
        """Returns the moment starts after growth.

        Args:
          source: The model before growth.
          now: Updates by the optimizer so far.
          keeps: Whether all new entries begin at zero, or only entries with unknown moments.
        """
        known, maps = dict(self.axes), growth.axis_maps(source)
        zeroed = growth.unknown_moments(source)
        for axis, axis_map in maps.items():
            is_zero = zeroed.get(axis, np.zeros(len(axis_map.sources), bool))
            is_zero = is_zero | axis_map.is_new if keeps else is_zero
            before = known.get(axis, (0,) * (max(axis_map.sources) + 1))
            copied = axis_map.pick(before, now)
            known[axis] = tuple(np.where(is_zero, now, copied).tolist())
        return dataclasses.replace(self, axes=_sorted(known))

    def after_freezing(
        self, trained_layers: Sequence[bool], now: int, model: ModelConfig
    ) -> "MomentStarts":
        """Returns the moment starts after frozen layers of a model have lost their moments.

        Learned positions are frozen, too.
        """
        known = dict(self.axes)
        for axis in LAYER_AXES if model.is_mixed else ("layers",):
            trained = [trained_layers[layer] for layer in layers_along(model, axis)]
            before = known.get(axis, (0,) * len(trained))
            known[axis] = tuple(np.where(trained, before, now).tolist())
        if model.positions == "learned":
            known["positions"] = (now,)  # one count for all
        embedding = self.embedding if model.tie_head else now
        return MomentStarts(axes=_sorted(known), embedding=embedding)


def learns(
    names: Axes, trained_layers: Sequence[bool], model: ModelConfig
) -> jax.Array | float:
    """Returns 1 for trained layers, head and final norm, and 0 for frozen entries."""
    if names.layer_axis is not None:
        layers = layers_along(model, names.layer_axis)
        trained = jnp.array([trained_layers[layer] for layer in layers], jnp.float32)
        return along(trained, names.names.index(names.layer_axis), len(names.names))
    frozen = [("positions",)] if model.tie_head else [("vocab",), ("positions",)]
    return 0.0 if names.reads in frozen else 1.0


def _int32(counts: Any) -> Any:
    return np.asarray(counts, np.int32) if isinstance(counts, int | tuple) else counts


def _sorted(known: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    return tuple(sorted((axis, numbers) for axis, numbers in known.items() if any(numbers)))
