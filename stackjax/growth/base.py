"""What a growth operator is: a value that says how everything of a model grows."""

import abc
import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import jax

from stackjax.model.config import ModelConfig

Promise = Literal["no", "exact_at_start", "exact"]
"""Whether the grown model computes the source's function: not, until it trains, always."""


@dataclasses.dataclass(frozen=True)
class Growth(abc.ABC):
    """A growth operator: pure functions from a source model to a larger target.

    Trees of parameters are plain dicts; `axes` is the tree of their `Axes`, which is the
    same for source and target.
    """

    @property
    @abc.abstractmethod
    def promise(self) -> Promise:
        """What the operator promises about the function that the model computes."""

    @abc.abstractmethod
    def target_config(self, source: ModelConfig) -> ModelConfig:
        """Returns the config of the grown model; ValueError if `source` cannot grow so."""

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
    def grow_moment(
        self, moment: Any, axes: Any, source: ModelConfig, *, order: Literal[1, 2]
    ) -> Any:
        """Returns a moment of the gradients as it grows with the parameters.

        A first moment takes the factor by which the gradient grows, a second its square.
        """


@dataclasses.dataclass(frozen=True)
class Chain(Growth):
    """Applies growths from first to last; build it with `chain`."""

    growths: tuple[Growth, ...]

    @property
    def promise(self) -> Promise:
        """The weakest promise of the links."""
        strength: list[Promise] = ["no", "exact_at_start", "exact"]
        return min((growth.promise for growth in self.growths), key=strength.index)

    def target_config(self, source: ModelConfig) -> ModelConfig:
        return functools.reduce(
            lambda config, growth: growth.target_config(config), self.growths, source
        )

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

    def grow_moment(
        self, moment: Any, axes: Any, source: ModelConfig, *, order: Literal[1, 2]
    ) -> Any:
        for growth in self.growths:
            moment = growth.grow_moment(moment, axes, source, order=order)
            source = growth.target_config(source)
        return moment


def chain(*growths: Growth) -> Growth:
    """Returns the growth that applies `growths` from first to last.

    Chains of chains are flat: `chain(a, chain(b, c)) == chain(chain(a, b), c)`.
    """
    links = tuple(
        link
        for growth in growths
        for link in (growth.growths if isinstance(growth, Chain) else (growth,))
    )
    if not links:
        raise ValueError("chain needs at least one growth.")
    return Chain(links)
