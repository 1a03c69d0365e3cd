"""Growths one after another."""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np

from stackjax.growth.axis_map import AxisMap
from stackjax.growth.base import FreshLayer, Growth, Order, Promise, Reparameterisation
from stackjax.model.config import ModelConfig
from stackjax.runtime.errors import UserError
from stackjax.runtime.ranges import Length

MAX_LINKS = 64


@dataclasses.dataclass(frozen=True)
class Chain(Growth):
    """Applies growths from first to last; build it with `chain`."""

    growths: Annotated[tuple[Growth, ...], Length(at_most=MAX_LINKS)]

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

    def unknown_moments(self, source: ModelConfig) -> dict[str, np.ndarray]:
        found: dict[str, np.ndarray] = {}
        for growth in self.growths:
            maps = growth.axis_maps(source)
            found = {
                axis: unknown[list(maps[axis].sources)] if axis in maps else unknown
                for axis, unknown in found.items()
            }
            for axis, unknown in growth.unknown_moments(source).items():
                found[axis] = found.get(axis, np.zeros_like(unknown)) | unknown
            source = growth.target_config(source)
        return found

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
    for link, following in itertools.pairwise(links):
        if link.promise == "exact_at_start" and following.promise != "exact_at_start":
            raise UserError(
                f"{following} follows {link} in a chain; growth behind masks comes last."
            )
    return links[0] if len(links) == 1 else Chain(links)
