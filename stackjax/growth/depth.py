"""Depthwise growth: every layer of the target is a copy of a layer of the source."""

import abc
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from stackjax.axes import Axes
from stackjax.growth.base import Growth, Promise
from stackjax.growth.pattern import parse_pattern
from stackjax.model.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class LayerGather(Growth):
    """Gathers the layers of the target from those of the source."""

    @abc.abstractmethod
    def sources(self, depth: int) -> tuple[int, ...]:
        """Returns the source layer, from 0, of every target layer."""

    @abc.abstractmethod
    def source_depth(self, depth: int) -> int:
        """Returns the number of layers that grows into `depth` layers."""

    @property
    def promise(self) -> Promise:
        return "no"

    def target_config(self, source: ModelConfig) -> ModelConfig:
        return dataclasses.replace(source, num_layers=len(self.sources(source.num_layers)))

    def source_config(self, target: ModelConfig) -> ModelConfig:
        return dataclasses.replace(target, num_layers=self.source_depth(target.num_layers))

    def grow_params(
        self,
        params: Any,
        axes: Any,
        source: ModelConfig,
        *,
        key: jax.Array,
        fresh: Callable[[ModelConfig], Any],
    ) -> Any:
        layers = self.sources(source.num_layers)
        return jax.tree.map(lambda leaf, names: _gather(leaf, names, layers), params, axes)

    def grow_moment(
        self, moment: Any, axes: Any, source: ModelConfig, *, order: Literal[1, 2]
    ) -> Any:
        # A copied layer starts with its source's gradient statistics, as they are.
        layers = self.sources(source.num_layers)
        return jax.tree.map(lambda leaf, names: _gather(leaf, names, layers), moment, axes)


@dataclasses.dataclass(frozen=True)
class Stack(LayerGather):
    """Repeats the whole stack of layers: 0 1 2 becomes 0 1 2 0 1 2.

    The G_stack of arXiv:2405.15319 (there also G_direct, depthwise).
    """

    factor: int = 4
    """How many times as deep the target is (the growth factor g)."""

    def __post_init__(self):
        _check_factor("Stack", self.factor)

    def sources(self, depth: int) -> tuple[int, ...]:
        return tuple(range(depth)) * self.factor

    def source_depth(self, depth: int) -> int:
        return _divide("Stack", depth, self.factor)


@dataclasses.dataclass(frozen=True)
class Interleave(LayerGather):
    """Repeats every layer in place: 0 1 2 becomes 0 0 1 1 2 2.

    The interpolation of arXiv:2405.15319.
    """

    factor: int = 2
    """How many times as deep the target is (the growth factor g)."""

    def __post_init__(self):
        _check_factor("Interleave", self.factor)

    def sources(self, depth: int) -> tuple[int, ...]:
        return tuple(layer for layer in range(depth) for _ in range(self.factor))

    def source_depth(self, depth: int) -> int:
        return _divide("Interleave", depth, self.factor)


@dataclasses.dataclass(frozen=True)
class LayerMap(LayerGather):
    """Names the source layer of every target layer.

    `LayerMap("12-3456*5-56")` in the notation of arXiv:2405.15319, which counts layers
    from 1, or `LayerMap((0, 1, 1, 2))`, which counts them from 0. When the target is
    given, the source has as many layers as the map names.
    """

    layers: tuple[int, ...] | str
    """The source layer of every target layer: a tuple from 0, or a pattern from 1."""

    def __post_init__(self):
        if not isinstance(self.layers, str) and (not self.layers or min(self.layers) < 0):
            raise ValueError(
                f"LayerMap {self.layers} must name at least one layer, counted from 0."
            )
        self._indices()

    def _indices(self) -> tuple[int, ...]:
        if isinstance(self.layers, str):
            return parse_pattern(self.layers)
        return self.layers

    def sources(self, depth: int) -> tuple[int, ...]:
        indices = self._indices()
        if max(indices) >= depth:
            base = 1 if isinstance(self.layers, str) else 0
            raise ValueError(
                f"LayerMap {self.layers!r} names layer {max(indices) + base} (counted from "
                f"{base}) of a model with {depth} layers."
            )
        return indices

    def source_depth(self, depth: int) -> int:
        indices = self._indices()
        if len(indices) != depth:
            raise ValueError(
                f"LayerMap {self.layers!r} makes {len(indices)} layers, but the target has "
                f"model.num_layers {depth}; let both agree."
            )
        return max(indices) + 1


def _check_factor(name: str, factor: int) -> None:
    if factor < 1:
        raise ValueError(f"{name} needs a factor of at least 1, got {factor}.")


def _divide(name: str, depth: int, factor: int) -> int:
    if depth % factor:
        raise ValueError(
            f"{name}(factor={factor}) cannot make model.num_layers {depth}: {factor} does "
            f"not divide {depth}."
        )
    return depth // factor


def _gather(leaf: jax.Array, axes: Axes, layers: Sequence[int]) -> jax.Array:
    if "layers" not in axes.names:
        return leaf
    axis = axes.names.index("layers")
    # Runs of consecutive layers are copied whole: as fast as memory, unlike a gather.
    runs = [
        jax.lax.slice_in_dim(leaf, start, stop, axis=axis)
        for start, stop in _consecutive_runs(layers)
    ]
    return jnp.concatenate(runs, axis=axis)


def _consecutive_runs(layers: Sequence[int]) -> list[tuple[int, int]]:
    """Returns (start, stop) of the runs of consecutive layers that make up `layers`."""
    runs: list[tuple[int, int]] = []
    for layer in layers:
        if runs and runs[-1][1] == layer:
            runs[-1] = (runs[-1][0], layer + 1)
        else:
            runs.append((layer, layer + 1))
    return runs
