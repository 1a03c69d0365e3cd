"""What a growth operator is: a value that says how everything of a model grows."""

from __future__ import annotations

import abc
import dataclasses
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from stackjax.model.config import SIZES, ModelConfig
from stackjax.runtime.constraints import check_fields

if TYPE_CHECKING:
    import jax

    from stackjax.growth.axis_map import AxisMap

Promise = Literal["no", "exact_at_start", "exact"]
"""Whether the grown model computes the source's function: not, until it trains, always."""

FreshLayer = Callable[[ModelConfig, Any], Any]
"""Initialises the parameters of one layer of a model, [1, ...] each."""

Order = Literal[0, 1, 2]
"""Power of the gradient's factor that something grows by: 1 for a first moment, 2 for a
second one, 0 to copy values as they are."""


class Reparameterisation(abc.ABC):
    """How the parameters that train become those that the model runs."""

    @abc.abstractmethod
    def model_params(self, params: Any, axes: Any, tokens: jax.Array) -> Any:
        """Returns the parameters that the model runs.

        Args:
          params: Those that train.
          axes: The `Axes` of each parameter of the model.
          tokens: Tokens since growth; a float32 scalar.
        """


@dataclasses.dataclass(frozen=True)
class Growth(abc.ABC):
    """A growth operator: pure functions from a source model to a larger target.

    Trees of parameters are plain dicts; `axes` is the tree of their `Axes`, which is the
    same for source and target. Every parameter grows by itself, so any part of a tree can
    be grown alone.
    """

    def __post_init__(self):
        check_fields(self, _snake_case(type(self).__name__))

    def __str__(self) -> str:
        """The textual form, which `parse_growth` reads: `stack(4)`."""
        fields = dataclasses.fields(self)
        values = {field.name: getattr(self, field.name) for field in fields}
        if len(values) == 1:
            (inside,) = map(str, values.values())
        else:
            stated = [f.name for f in fields if values[f.name] != f.default]
            inside = ", ".join(f"{name}={values[name]}" for name in stated)
        return f"{_snake_case(type(self).__name__)}({inside})"

    @property
    @abc.abstractmethod
    def promise(self) -> Promise:
        """What the operator promises about the function that the model computes."""

    def is_symmetric(self, before: bool = False) -> bool:
        """Whether copies in the target are equal, and so stay equal while they train.

        Args:
          before: Whether the source has such copies.
        """
        return before

    @abc.abstractmethod
    def axis_maps(self, source: ModelConfig) -> dict[str, AxisMap]:
        """Returns how every axis grows that does; UserError if `source` cannot grow so."""

    @abc.abstractmethod
    def source_config(self, target: ModelConfig) -> ModelConfig:
        """Returns the config that grows into `target`; UserError if none does."""

    @abc.abstractmethod
    def grow_params(
        self,
        params: Any,
        axes: Any,
        source: ModelConfig,
        *,
        key: jax.Array,
        fresh: Callable[[ModelConfig], Any],
    ) -> Any:
        """Returns the parameters of the target.

        Args:
          source: The config that `params` belong to.
          key: Randomness, for operators that need some.
          fresh: Initialises parameters; called only by operators that need new values.
        """

    @abc.abstractmethod
    def grow_moment(self, moment: Any, axes: Any, source: ModelConfig, *, order: Order) -> Any:
        """Returns a moment of the gradients as it grows with the parameters.

        A first moment takes the factor by which the gradient grows, a second its square.
        What no gradient of the source tells about is zero.
        """

    def unknown_moments(self, source: ModelConfig) -> dict[str, np.ndarray]:
        """Returns which indices of an axis `grow_moment` leaves without moments, by axis.

        An entry has none, and begins at zero, if one of its indices is among them.
        """
        return {}

    def layer_sources(self, source: ModelConfig) -> np.ndarray:
        """Returns the layers of the source that make each layer of the target, [target, k].

        UserError if all layers make each.
        """
        return np.arange(source.num_layers)[:, None]

    def grow_layer(
        self,
        layer: jax.Array | int,
        params: Any,
        axes: Any,
        source: ModelConfig,
        *,
        key: jax.Array,
        fresh: FreshLayer,
    ) -> Any:
        """Returns the parameters of one layer of the target, [1, ...] each.

        Those that `grow_params` makes, where nothing in them is random.

        Args:
          layer: Which, from 0.
          params: Of the layers that `layer_sources` names, [k, ...].
          source: The config of the whole model.
          key: Randomness, the same for all layers.
        """
        import jax

        return self.grow_params(
            params,
            axes,
            source,
            key=jax.random.fold_in(key, layer),
            fresh=lambda config: fresh(config, layer),
        )

    def target_config(self, source: ModelConfig) -> ModelConfig:
        """Returns the config of the grown model; UserError if `source` cannot grow so."""
        maps = self.axis_maps(source).items()
        return dataclasses.replace(
            source, **{SIZES[axis]: len(axis_map.sources) for axis, axis_map in maps}
        )

    def reparameterisations(self, source: ModelConfig) -> tuple[Reparameterisation, ...]:
        """Returns what lies between the parameters that train and those that the model runs."""
        return ()


def _snake_case(name: str) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()
