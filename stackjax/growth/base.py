"""What a growth operator is: a value that says how everything of a model grows."""

import abc
import dataclasses
import re
import zlib
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from stackjax.growth.axis_map import AxisMap, is_new
from stackjax.model.config import SIZES, ModelConfig
from stackjax.runtime.constraints import check_fields
from stackjax.sharding.axes import Axes

Promise = Literal["no", "exact_at_start", "exact"]
"""Whether the grown model computes the source's function: not, until it trains, always."""

FreshLayer = Callable[[ModelConfig, jax.Array | int], Any]
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


def map_params(
    grow: Callable[..., jax.Array], params: Any, axes: Any, *rest: Any, key: jax.Array
) -> Any:
    """Returns `grow(parameter, its Axes, *rest, key)` for every parameter.

    The keys differ, and depend on nothing but `key` and the parameter's name.
    """

    def grow_leaf(path: Any, leaf: jax.Array, *others: Any) -> jax.Array:
        return grow(leaf, *others, fold_name(key, jax.tree_util.keystr(path)))

    return jax.tree_util.tree_map_with_path(grow_leaf, params, axes, *rest)


def fold_name(key: jax.Array, name: str) -> jax.Array:
    """Returns a key that depends on nothing but `key` and the name."""
    return jax.random.fold_in(key, zlib.crc32(name.encode()))


def writes_residual(names: Axes) -> bool:
    """Returns whether a parameter is a matrix that adds to the residual stream."""
    return bool(names.reads) and names.writes == ("embed",)


def fill_new(
    grown: jax.Array,
    names: Axes,
    maps: Mapping[str, AxisMap],
    fresh: jax.Array,
    *,
    zero_writers: bool,
) -> jax.Array:
    """Returns what `fill` makes of a grown parameter; one that does not grow is as it was."""
    if not any(name in maps for name in names.names):
        return grown
    return fill(grown, names, is_new(names, maps), fresh, zero_writers=zero_writers)


def fill(
    grown: jax.Array, names: Axes, new: jax.Array, fresh: jax.Array, *, zero_writers: bool
) -> jax.Array:
    """Returns a grown parameter whose new entries are fresh.

    With `zero_writers`, those that add to the residual stream are zero instead, so that
    nothing that is new has an effect yet.
    """
    values = jnp.zeros_like(grown) if zero_writers and writes_residual(names) else fresh
    return jnp.where(new, values, grown)
