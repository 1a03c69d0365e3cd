"""The base class of growth operators."""

from __future__ import annotations

import abc
import dataclasses
import importlib
import inspect
import math
import pkgutil
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from stackjax.model.config import SIZES, ModelConfig
from stackjax.runtime.constraints import check_fields
from stackjax.runtime.errors import UserError

if TYPE_CHECKING:
    import jax

    from stackjax.growth.axis_map import AxisMap

Preservation = Literal["never", "at_start", "always"]
"""Is growth function-preserving? `at_start` means until the grown model trains."""

Order = Literal[0, 1, 2]
"""Exponent of the gradient's factor when an array grows.

1 for the first moment, 2 for the second moment, 0 for a plain copy.
"""

OptimizerState = Literal["reset", "grow", "keep"]
"""What growth does to the optimizer state.

`reset`: a new optimizer. `grow`: moments grow with the gradient. `keep`: old moments stay,
moments of new parameters are zero.
"""

_REGISTERED: dict[str, type[Growth]] = {}


class Reparameterization(abc.ABC):
    """A function from trained parameters to model parameters."""

    @property
    def end_tokens(self) -> float:
        """Tokens since growth after which both are equal; infinite by default."""
        return math.inf

    @abc.abstractmethod
    def model_params(self, params: Any, axes: Any, tokens: jax.Array) -> Any:
        """Returns the model parameters.

        Args:
          params: The trained parameters.
          axes: The `Axes` of each model parameter.
          tokens: Tokens since growth; a float32 scalar.
        """


@dataclasses.dataclass(frozen=True)
class Fit(Reparameterization):
    """A training phase for a growth operator's parameters, before the model trains.

    The phase's parameters are `{"maps": fitted, "source": fixed}`.
    """

    num_steps: int
    learning_rate: float
    """Constant; without weight decay."""

    @abc.abstractmethod
    def init_maps(self, axes: Any, key: jax.Array) -> Any:
        """Returns the initial values of the fitted parameters.

        Args:
          axes: The `Axes` of each source parameter.
        """

    @abc.abstractmethod
    def flops(self, axes: Any) -> int:
        """Returns the extra FLOPs of each microbatch, for target parameters and gradients."""


@dataclasses.dataclass(frozen=True)
class Growth(abc.ABC):
    """A growth operator: pure functions from a source model to a larger target model.

    A subclass is registered under its class name in snake case: `class MyStack(Growth)` is
    `my_stack(...)` in a config, on the command line and in a checkpoint. `axis_maps`,
    `source_config` and `grow_params` are required.

    Parameter trees are plain dicts; `axes` is the tree of the source's `Axes`. Each parameter
    grows alone, so any part of a tree can grow without the rest.
    """

    def __init_subclass__(cls, *, is_operator: bool = True, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        if is_operator:
            name = snake_case(cls.__name__)
            _check_free(name, cls)
            _REGISTERED[name] = cls

    def __post_init__(self):
        check_fields(self, snake_case(type(self).__name__))

    def __str__(self) -> str:
        """The growth as text, for `parse_growth`: `stack(4)`."""
        fields = dataclasses.fields(self)
        values = {field.name: getattr(self, field.name) for field in fields}
        if len(values) == 1:
            (inside,) = map(_show, values.values())
        else:
            stated = [f.name for f in fields if values[f.name] != f.default]
            inside = ", ".join(f"{name}={_show(values[name])}" for name in stated)
        return f"{snake_case(type(self).__name__)}({inside})"

    @property
    def preserves_function(self) -> Preservation:
        """Does the target model compute the source model's function?"""
        return "never"

    @property
    def is_fitted(self) -> bool:
        """Does the growth need a `fit` before the model trains?"""
        return False

    @property
    def grows_folded(self) -> bool:
        """Does `grow_params` take folded parameters under CompleteP?

        Folded parameters hold the factors of residual branches and logits. An operator that
        preserves the function of standard models then preserves it under CompleteP, too.
        Without folding, copies of layers have the smaller branches of a deeper model.
        """
        return True

    def is_symmetric(self, before: bool = False) -> bool:
        """Returns whether copies in the target are equal, and stay equal while they train.

        Args:
          before: Whether the source has such copies.
        """
        return before

    @abc.abstractmethod
    def axis_maps(self, source: ModelConfig) -> dict[str, AxisMap]:
        """Returns the map of each growing axis; UserError if `source` does not fit."""

    @abc.abstractmethod
    def source_config(self, target: ModelConfig) -> ModelConfig:
        """Returns the config that grows into `target`; UserError if there is none."""

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
        """Returns the target parameters.

        Args:
          source: The config of `params`.
          key: Randomness of the operator.
          fresh: Returns initial parameters of a config, with the structure of the result.
        """

    def grow_moment(self, moment: Any, axes: Any, source: ModelConfig, *, order: Order) -> Any:
        """Returns a grown moment of the gradients; by default, copies.

        The first moment grows by the gradient's factor, the second moment by its square.
        Moments of new parameters without a known gradient are zero.
        """
        # Not at the top: `--help` works without JAX.
        from stackjax.growth.axis_map import gather_tree

        return gather_tree(moment, axes, self.axis_maps(source))

    def target_params(
        self,
        params: Any,
        axes: Any,
        source: ModelConfig,
        *,
        key: jax.Array,
        fresh: Callable[[ModelConfig], Any],
    ) -> Any:
        """Returns the target parameters, like `grow_params`, also under CompleteP.

        Args:
          fresh: Returns all initial parameters of a config.
        """
        from stackjax.growth.parametrized import grow_params

        return grow_params(self, params, axes, source, key=key, fresh=fresh)

    def target_moment(
        self, moment: Any, axes: Any, source: ModelConfig, *, order: Order
    ) -> Any:
        """Returns a grown moment, like `grow_moment`, also under CompleteP."""
        from stackjax.growth.parametrized import grow_moment

        return grow_moment(self, moment, axes, source, order=order)

    def unknown_moments(self, source: ModelConfig) -> dict[str, np.ndarray]:
        """Returns a mask of the target indices, by axis, with zeros from `grow_moment`.

        An entry of a moment is zero if the mask holds for any of its indices.
        """
        return {}

    def target_config(self, source: ModelConfig) -> ModelConfig:
        """Returns the target config; UserError if `source` does not fit."""
        maps = self.axis_maps(source)
        target = dataclasses.replace(
            source,
            **{SIZES[axis]: len(maps[axis].sources) for axis in maps if axis in SIZES},
        )
        if "layers" in maps:
            check_kinds(self, maps["layers"].sources, source, target)
        return target

    def origins(self, source: ModelConfig) -> dict[str, str]:
        """Returns the source parameter's name for each target parameter with another name."""
        return {}

    def target_tree(self, tree: Any, source: ModelConfig) -> Any:
        """Returns a tree like the target parameters, with the leaf of each one's origin.

        Args:
          tree: A tree like the source parameters, or like any part of them; returned itself
            if no parameter has another name.
        """
        made: dict[str, list[str]] = {}
        for name, origin in self.origins(source).items():
            made.setdefault(origin, []).append(name)
        return _renamed(tree, made) if made else tree

    def target_axes(self, axes: Any, source: ModelConfig) -> Any:
        """Returns the `Axes` of the target parameters with an origin in a part of the tree."""
        origins = self.target_tree(axes, source)
        if origins is axes:
            return axes
        from stackjax import model
        from stackjax.growth.values import part_of

        return part_of(model.logical_axes(self.target_config(source)), origins)

    def reparameterizations(self, source: ModelConfig) -> tuple[Reparameterization, ...]:
        """Returns the functions from trained parameters to model parameters, in order."""
        return ()

    def fit(self, source: ModelConfig) -> Fit | None:
        """Returns the training phase of the operator's own parameters, if there is one."""
        return None


def operators() -> dict[str, type[Growth]]:
    """Returns all growth operators by name, user-defined operators included."""
    _load_built_in()
    return {name: kind for name, kind in _REGISTERED.items() if not inspect.isabstract(kind)}


def check_kinds(
    growth: Growth, layers: Sequence[int], source: ModelConfig, target: ModelConfig
) -> None:
    """Raises UserError if a copied layer's kind would change.

    Args:
      layers: The source layer of each target layer; negative for a new layer.
    """
    if not source.pattern:
        return
    old, new = source.kinds, target.kinds
    for place, layer in enumerate(layers):
        if layer >= 0 and new[place] != old[layer]:
            raise UserError(
                f"{growth} makes layer {place} (counted from 0; {new[place]}) from layer "
                f"{layer} ({old[layer]}), and the kind of a layer stays: copy whole periods of "
                f"the {len(source.pattern)} layers in model.pattern."
            )


def _renamed(tree: Any, made: Mapping[str, Sequence[str]]) -> Any:
    """Returns nested dicts with each leaf under the names made of its own."""
    renamed: dict[str, Any] = {}
    for name, branch in tree.items():
        if isinstance(branch, dict):
            renamed[name] = _renamed(branch, made)
        else:
            renamed |= dict.fromkeys(made.get(name, (name,)), branch)
    return renamed


def snake_case(name: str) -> str:
    """Returns a class name in snake case.

    >>> snake_case("DepthZero")
    'depth_zero'
    """
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()


def _load_built_in() -> None:
    """Imports all modules of this package, to register the built-in operators."""
    package = importlib.import_module(__name__.rpartition(".")[0])
    for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
        importlib.import_module(module.name)


def _check_free(name: str, kind: type[Growth]) -> None:
    """Raises UserError if a user's operator has a built-in operator's name."""
    if _is_built_in(kind):
        return
    _load_built_in()
    # A config can be loaded again: the newest user class counts.
    if name in _REGISTERED and _is_built_in(_REGISTERED[name]):
        raise UserError(
            f"growth operator {kind.__qualname__} has the name {name!r} of a built-in "
            f"operator; rename the class."
        )


def _is_built_in(kind: type) -> bool:
    return kind.__module__.partition(".")[0] == __name__.partition(".")[0]


def _show(value: Any) -> str:
    return str(list(value)).replace(" ", "") if isinstance(value, tuple) else str(value)
