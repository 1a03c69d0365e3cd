"""Births of moments: the update after which each entry begins to average gradients.

Adam and Muon divide a moment by 1 - decay^k after k updates. Growth and the release of frozen
layers set moments to zero while the optimizer counts on. Its count is too large a k for such
entries: at b2 0.999 their steps would be up to 6.6 times too long.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from stackjax.growth.axis_map import along
from stackjax.growth.base import Growth
from stackjax.model.config import ModelConfig
from stackjax.sharding.axes import Axes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Births:
    """Counts of the optimizer at the birth of each entry.

    An entry is as young as its youngest index. Axes without numbers begin with the optimizer.
    """

    axes: tuple[tuple[str, tuple[int, ...]], ...] = ()
    """A count for each index, by the name of the axis."""
    embedding: int = 0
    """The count for the whole embedding, which can be frozen alone."""
    now: int = 0
    """The count at the start of the phase."""

    def correction(self, names: Axes, decay: float, count: jax.Array) -> jax.Array:
        """Returns 1 - decay^k for each entry of a parameter, k updates after birth.

        Args:
          count: Updates by the optimizer; an int32 scalar.
        """
        # The youngest index has the smallest correction. Vectors are enough: an array as large
        # as the parameter would become a constant in the program.
        corrections = [1 - decay ** (count - birth) for birth in self._of(names)]
        return functools.reduce(jnp.minimum, corrections)

    def _of(self, names: Axes) -> list[np.ndarray]:
        rank = len(names.names)
        whole = self.embedding if names.reads == ("vocab",) else 0
        births = [np.full((1,) * rank, whole, np.int32)]
        for axis, numbers in self.axes:
            if axis in names.names:
                place = names.names.index(axis)
                shape = [-1 if i == place else 1 for i in range(rank)]
                births.append(np.array(numbers, np.int32).reshape(shape))
        return births

    def after_growth(
        self, growth: Growth, source: ModelConfig, now: int, *, keeps: bool
    ) -> "Births":
        """Returns the births after growth.

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
            copied = np.array(before)[list(axis_map.sources)]
            known[axis] = tuple(np.where(is_zero, now, copied).tolist())
        return dataclasses.replace(self, axes=_sorted(known))

    def after_freezing(
        self, trained_layers: Sequence[bool], now: int, *, has_frozen_embedding: bool
    ) -> "Births":
        """Returns the births after frozen layers have lost their moments."""
        known = dict(self.axes)
        before = known.get("layers", (0,) * len(trained_layers))
        known["layers"] = tuple(np.where(trained_layers, before, now).tolist())
        embedding = now if has_frozen_embedding else self.embedding
        return Births(axes=_sorted(known), embedding=embedding)

    def begun_at(self, now: int) -> "Births":
        """Returns the births if the phase begins at another count of updates."""

        def move(birth: int) -> int:
            return now if birth == self.now else birth

        axes = tuple((axis, tuple(map(move, numbers))) for axis, numbers in self.axes)
        return Births(axes=axes, embedding=move(self.embedding), now=now)


def learns(
    names: Axes, trained_layers: Sequence[bool], *, has_tied_head: bool
) -> jax.Array | float:
    """Returns 1 for trained layers, head and final norm, and 0 for frozen entries."""
    if "layers" in names.stacked:
        trained = jnp.array(trained_layers, jnp.float32)
        return along(trained, names.names.index("layers"), len(names.names))
    return 0.0 if names.reads == ("vocab",) and not has_tied_head else 1.0


def _sorted(known: Mapping[str, tuple[int, ...]]) -> tuple[tuple[str, tuple[int, ...]], ...]:
    return tuple(sorted((axis, numbers) for axis, numbers in known.items() if any(numbers)))
