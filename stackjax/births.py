"""When the moments of each parameter begin: at zero, and not always with the optimizer.

Adam and Muon divide a moment by 1 - decay^k after k updates. The count of the optimizer is
too large a k for an entry whose moments were set to zero later, by growth or by the release
of a frozen layer: with b2 0.999 its steps would be up to 6.6 times too long.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from stackjax.axes import Axes
from stackjax.growth.axis_map import along
from stackjax.growth.base import Growth
from stackjax.model.config import ModelConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Births:
    """The updates that an optimizer had made when the moments of each entry began at zero.

    An entry begins with its youngest index. Axes without a number begin with the optimizer.
    """

    axes: tuple[tuple[str, tuple[int, ...]], ...] = ()
    """A number for each index of an axis, by the name of the axis."""
    embedding: int = 0
    """The same for the embedding as a whole, if it was frozen by itself."""
    now: int = 0
    """The updates that the optimizer has made when the phase begins."""

    def correction(self, names: Axes, decay: float, count: jax.Array) -> jax.Array:
        """Returns 1 - decay^k for each entry of a parameter, k updates after its birth.

        Args:
          count: Updates of the optimizer; an int32 scalar.
        """
        # The youngest index has the smallest correction. Of vectors alone, as an array of
        # the size of the parameter would be a constant in the program.
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
        """Returns the births of a grown model.

        Args:
          source: The model that grows.
          now: The updates of the optimizer so far.
          keeps: Whether all new entries begin at zero, or only those whose moments the
            growth cannot tell.
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
        """Returns the births of a model whose frozen layers lose their moments now."""
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
    """Returns 1 for entries that learn while only some layers do: head and final norm too."""
    if "layers" in names.stacked:
        trained = jnp.array(trained_layers, jnp.float32)
        return along(trained, names.names.index("layers"), len(names.names))
    return 0.0 if names.reads == ("vocab",) and not has_tied_head else 1.0


def _sorted(known: Mapping[str, tuple[int, ...]]) -> tuple[tuple[str, tuple[int, ...]], ...]:
    return tuple(sorted((axis, numbers) for axis, numbers in known.items() if any(numbers)))
