"""What a growth operator is: a value that says how everything of a model grows."""

import abc
import dataclasses
import functools
import itertools
import re
import zlib
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from stackjax.axes import Axes
from stackjax.growth.axis_map import AxisMap
from stackjax.model.config import SIZES, ModelConfig

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
        """Returns how every axis grows that does; ValueError if `source` cannot grow so."""

    @abc.abstractmethod
    def source_config(self, target: ModelConfig) -> ModelConfig:
        """Returns the config that grows into `target`; ValueError if none does."""

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

    def layer_sources(self, source: ModelConfig) -> np.ndarray:
        """Returns the layers of the source that make each layer of the target, [target, k].

        ValueError if all layers make each.
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
        """Returns the config of the grown model; ValueError if `source` cannot grow so."""
        maps = self.axis_maps(source).items()
        return dataclasses.replace(
            source, **{SIZES[axis]: len(axis_map.sources) for axis, axis_map in maps}
        )

    def reparameterisations(self, source: ModelConfig) -> tuple[Reparameterisation, ...]:
        """Returns what lies between the parameters that train and those that the model runs."""
        return ()


@dataclasses.dataclass(frozen=True)
class Chain(Growth):
    """Applies growths from first to last; build it with `chain`."""

    growths: tuple[Growth, ...]

    def __str__(self) -> str:
        return " + ".join(map(str, self.growths))

    @property
    def promise(self) -> Promise:
        """The weakest promise of the links."""
        strength: list[Promise] = ["no", "exact_at_start", "exact"]
        return min((growth.promise for growth in self.growths), key=strength.index)

    def is_symmetric(self, before: bool = False) -> bool:
        for growth in self.growths:
            before = growth.is_symmetric(before)
        return before

    def axis_maps(self, source: ModelConfig) -> dict[str, AxisMap]:
        maps: dict[str, AxisMap] = {}
        for growth in self.growths:
            for axis, axis_map in growth.axis_maps(source).items():
                maps[axis] = axis_map.after(maps[axis]) if axis in maps else axis_map
            source = growth.target_config(source)
        return maps

    def source_config(self, target: ModelConfig) -> ModelConfig:
        return functools.reduce(
            lambda config, growth: growth.source_config(config),
            self.growths[::-1],
            target,
        )

    def grow_params(
        self,
        params: Any,
        axes: Any,
        source: ModelConfig,
        *,
        key: jax.Array,
        fresh: Callable[[ModelConfig], Any],
    ) -> Any:
        for i, growth in enumerate(self.growths):
            link_key = jax.random.fold_in(key, i)
            params = growth.grow_params(params, axes, source, key=link_key, fresh=fresh)
            source = growth.target_config(source)
        return params

    def layer_sources(self, source: ModelConfig) -> np.ndarray:
        first, *rest = self.growths
        sources, source = first.layer_sources(source), first.target_config(source)
        for growth in rest:
            following = growth.layer_sources(source)
            sources = sources[following].reshape(len(following), -1)
            source = growth.target_config(source)
        return sources

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
        *before, last = self.growths
        if before:
            first = Chain(tuple(before))
            between = first.target_config(source)
            made_of = last.layer_sources(between)
            # What only moves layers hands on what it gets.
            parts = [params] if made_of.shape[1] == 1 else _split(params, made_of.shape[1])
            made = [
                first.grow_layer(
                    jnp.asarray(made_of)[layer, i], part, axes, source, key=key, fresh=fresh
                )
                for i, part in enumerate(parts)
            ]
            params = made[0] if len(made) == 1 else _join(made)
            source = between
        link_key = jax.random.fold_in(key, len(before))
        return last.grow_layer(layer, params, axes, source, key=link_key, fresh=fresh)

    def grow_moment(self, moment: Any, axes: Any, source: ModelConfig, *, order: Order) -> Any:
        for growth in self.growths:
            moment = growth.grow_moment(moment, axes, source, order=order)
            source = growth.target_config(source)
        return moment

    def reparameterisations(self, source: ModelConfig) -> tuple[Reparameterisation, ...]:
        found: list[Reparameterisation] = []
        for growth in self.growths:
            found += growth.reparameterisations(source)
            source = growth.target_config(source)
        return tuple(found)


def _split(params: Any, number: int) -> list[Any]:
    """Returns parts of equal length along the first axis."""
    leaves, structure = jax.tree.flatten(params)
    parts = zip(*(jnp.split(leaf, number) for leaf in leaves), strict=True)
    return [jax.tree.unflatten(structure, part) for part in parts]


def _join(parts: list[Any]) -> Any:
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)


def chain(*growths: Growth) -> Growth:
    """Returns the growth that applies `growths` from first to last.

    Chains of chains are flat, `chain(a, chain(b, c)) == chain(chain(a, b), c)`, and a chain
    of one growth is that growth.
    """
    links = tuple(
        link
        for growth in growths
        for link in (growth.growths if isinstance(growth, Chain) else (growth,))
    )
    if not links:
        raise ValueError("chain needs at least one growth.")
    for link, following in itertools.pairwise(links):
        if link.promise == "exact_at_start" and following.promise != "exact_at_start":
            raise ValueError(
                f"{following} follows {link} in a chain; growth behind masks comes last."
            )
    first, *rest = links
    return Chain(links) if rest else first


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
    grown: jax.Array, names: Axes, new: jax.Array, fresh: jax.Array, *, zero_writers: bool
) -> jax.Array:
    """Returns a grown parameter whose new entries are fresh.

    With `zero_writers`, those that add to the residual stream are zero instead, so that
    nothing that is new has an effect yet.
    """
    values = jnp.zeros_like(grown) if zero_writers and writes_residual(names) else fresh
    return jnp.where(new, values, grown)
