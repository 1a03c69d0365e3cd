"""Chains of growth operators."""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Annotated, Any, get_args

import jax
import numpy as np

from stackjax.growth.axis_map import AxisMap
from stackjax.growth.base import Growth, Order, Preservation, Reparameterization
from stackjax.model.config import ModelConfig
from stackjax.runtime.errors import UserError
from stackjax.runtime.ranges import Length

MAX_LINKS = 64


@dataclasses.dataclass(frozen=True)
class Chain(Growth, is_operator=False):
    """Applies growths from first to last; `chain` builds this class."""

    growths: Annotated[tuple[Growth, ...], Length(at_most=MAX_LINKS)]

    def __str__(self) -> str:
        return " + ".join(map(str, self.growths))

    @property
    def preserves_function(self) -> Preservation:
        """The weakest preservation of all links."""
        found = {growth.preserves_function for growth in self.growths}
        return next(each for each in get_args(Preservation) if each in found)

    @property
    def is_fitted(self) -> bool:
        return any(growth.is_fitted for growth in self.growths)

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

    def target_config(self, source: ModelConfig) -> ModelConfig:
        return functools.reduce(
            lambda config, growth: growth.target_config(config), self.growths, source
        )

    def target_tree(self, tree: Any, source: ModelConfig) -> Any:
        for growth in self.growths:
            tree = growth.target_tree(tree, source)
            source = growth.target_config(source)
        return tree

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
            params = growth.target_params(params, axes, source, key=link_key, fresh=fresh)
            axes = growth.target_axes(axes, source)
            source = growth.target_config(source)
        return params

    # Each link decides on folding alone.
    target_params = grow_params

    def unknown_moments(self, source: ModelConfig) -> dict[str, np.ndarray]:
        found: dict[str, np.ndarray] = {}
        for growth in self.growths:
            maps = growth.axis_maps(source)
            found = {
                axis: np.array(maps[axis].pick(unknown, True)) if axis in maps else unknown
                for axis, unknown in found.items()
            }
            for axis, unknown in growth.unknown_moments(source).items():
                found[axis] = found.get(axis, np.zeros_like(unknown)) | unknown
            source = growth.target_config(source)
        return found

    def grow_moment(self, moment: Any, axes: Any, source: ModelConfig, *, order: Order) -> Any:
        for growth in self.growths:
            moment = growth.target_moment(moment, axes, source, order=order)
            axes = growth.target_axes(axes, source)
            source = growth.target_config(source)
        return moment

    target_moment = grow_moment

    def reparameterizations(self, source: ModelConfig) -> tuple[Reparameterization, ...]:
        found: list[Reparameterization] = []
        masked: set[str] = set()
        for growth in self.growths:
            grown = growth.axis_maps(source).keys()
            if again := sorted(masked & grown):
                raise UserError(
                    f"{self} grows {', '.join(again)} behind masks twice; use one operator "
                    f"with the product of both factors."
                )
            if growth.preserves_function == "at_start":
                masked |= grown
            found += growth.reparameterizations(source)
            source = growth.target_config(source)
        return tuple(found)


def chain(*growths: Growth) -> Growth:
    """Returns the growth that applies `growths` from first to last.

    Nested chains are flattened: `chain(a, chain(b, c)) == chain(chain(a, b), c)`. A single
    growth is returned as is.
    """
    links = tuple(
        link
        for growth in growths
        for link in (growth.growths if isinstance(growth, Chain) else (growth,))
    )
    for link, following in itertools.pairwise(links):
        opens, follows = link.preserves_function, following.preserves_function
        if opens == "at_start" and follows != "at_start":
            raise UserError(
                f"{following} follows {link} in a chain; growth behind masks comes last."
            )
    return links[0] if len(links) == 1 else Chain(links)
