"""Scans over layers whose kinds repeat.

A scan's body runs one period of the pattern, so compile time does not depend on the depth.
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from stackjax.model.config import ModelConfig
from stackjax.model.layer_kind import LayerKind
from stackjax.sharding.axes import LAYER_AXES
from stackjax.sharding.partition import layout

Carry = TypeVar("Carry")


@dataclasses.dataclass(frozen=True)
class LayerRun:
    """Consecutive layers in whole periods."""

    start: int
    """First layer."""
    stop: int
    """First layer after the run."""
    kinds: tuple[LayerKind, ...]
    """Kinds in a period."""


def layer_runs(kinds: Sequence[LayerKind], period: int) -> list[LayerRun]:
    """Returns the runs, from first to last.

    Two or more whole periods are a single run. The other layers are runs with equal kinds.

    Args:
      kinds: Every layer's kind.
      period: The pattern's length.
    """
    whole = len(kinds) // period * period
    if whole <= period or len(set(kinds)) == 1:
        whole = 0
    runs = [LayerRun(0, whole, tuple(kinds[:period]))] if whole else []
    start = whole
    for kind, group in itertools.groupby(kinds[whole:]):
        stop = start + len(list(group))
        runs.append(LayerRun(start, stop, (kind,)))
        start = stop
    return runs


def _runs(config: ModelConfig, first: int, length: int) -> list[LayerRun]:
    """Returns the runs for `length` layers; without layers, an empty run."""
    if not length:
        return [LayerRun(0, 0, config.period_kinds[:1])]
    return layer_runs(config.kinds[first : first + length], len(config.period_kinds))


def scan_layers(
    run_layer: Callable[[LayerKind], Callable[[Carry, Any], tuple[Carry, Any]]],
    carry: Carry,
    layers: Any,
    config: ModelConfig,
    first: int = 0,
    unroll: int = 1,
    axes: Any = None,
    wrap: Callable[[Any, bool], Any] = lambda body, _: body,
) -> tuple[Carry, Any]:
    """Returns the carry after all layers and the stacked outputs, as `jax.lax.scan`.

    In mixed models, a body has None for other layers' arrays. Layers with the output None are
    left out of the outputs.

    Args:
      run_layer: Returns the scan's body for a kind.
      layers: Arrays with a leading axis over layers.
      first: The model's layer that is first in `layers`.
      unroll: Layers per iteration, rounded down to whole periods, at least one.
      axes: Each array's leading axis, from `LAYER_AXES`; None for `layers` everywhere.
      wrap: Returns a body to run instead of a body. Its second argument is whether the body's
        loop has a single iteration, which the compiler inlines.
    """
    axes = jax.tree.map(lambda _: "layers", layers) if axes is None else _filled(axes, layers)
    outputs, runs = [], _runs(config, first, _num_layers(layers, axes))
    for run in runs:
        part = layers
        if len(runs) > 1:
            part = layers_between(layers, axes, config, run.start, run.stop, first)
        length, size = run.stop - run.start, len(run.kinds)
        steps = max(1, min(unroll, length) // size)
        bodies = [wrap(run_layer(kind), steps * size >= length) for kind in run.kinds]
        if size == 1:
            part = _of_kind(config, part, axes, run.kinds[0])
            carry, output = jax.lax.scan(bodies[0], carry, part, length, unroll=steps)
        else:
            counts = {
                axis: sum(config.is_along(axis, k) for k in run.kinds) for axis in LAYER_AXES
            }
            periods = jax.tree.map(
                lambda leaf, axis: _in_periods(leaf, counts[axis]),  # noqa: B023
                part,
                axes,
            )
            body = _period(bodies, run.kinds, config, axes)
            carry, output = jax.lax.scan(body, carry, periods, unroll=steps)
            output = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), output)
        outputs.append(output)
    return carry, joined(outputs)


def joined(outputs: Sequence[Any]) -> Any:
    """Returns consecutive layers' stacked outputs as one; None stands for no outputs."""
    present = [output for output in outputs if output is not None]
    if len(present) < 2:
        return present[0] if present else None
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *present)


def layers_between(
    layers: Any, axes: Any, config: ModelConfig, start: int, stop: int, first: int = 0
) -> Any:
    """Returns stacked arrays from one layer to another, counted from `first`.

    Args:
      axes: As in `scan_layers`.
    """

    def part(leaf: jax.Array, axis: str = "layers") -> jax.Array:
        along = [config.is_along(axis, kind) for kind in config.kinds[first : first + stop]]
        return leaf[sum(along[:start]) : sum(along)]

    return jax.tree.map(part, layers) if axes is None else jax.tree.map(part, layers, axes)


def _num_layers(layers: Any, axes: Any) -> int:
    pairs = zip(jax.tree.leaves(layers), jax.tree.leaves(axes), strict=True)
    return next(leaf.shape[0] for leaf, axis in pairs if axis == "layers")


def _filled(axes: Any, layers: Any) -> Any:
    """Returns each array's axis, where None stands for `layers` in a whole subtree."""
    return jax.tree.map(
        lambda part, arrays: jax.tree.map(lambda _: "layers", arrays) if part is None else part,
        axes,
        layers,
        is_leaf=lambda node: node is None,
    )


def _of_kind(config: ModelConfig, layers: Any, axes: Any, kind: LayerKind) -> Any:
    """Returns the arrays in a kind's layers, and None for others."""
    return jax.tree.map(
        lambda leaf, axis: leaf if config.is_along(axis, kind) else None, layers, axes
    )


def _period(
    bodies: Sequence[Callable[[Carry, Any], tuple[Carry, Any]]],
    kinds: Sequence[LayerKind],
    config: ModelConfig,
    axes: Any,
) -> Callable[[Carry, Any], tuple[Carry, Any]]:
    """Returns a scan's body for a period, from one for each layer."""

    def run(carry: Carry, layers: Any) -> tuple[Carry, Any]:
        leaves, tree = jax.tree.flatten(layers)
        of_leaf = jax.tree.leaves(axes)
        # A split's transpose is a concatenation; indexing would add padded arrays.
        cut = [iter(jax.lax.split(leaf, [1] * leaf.shape[0])) for leaf in leaves]
        outputs = []
        for body, kind in zip(bodies, kinds, strict=True):
            layer = tree.unflatten(
                jnp.squeeze(next(parts), 0) if config.is_along(axis, kind) else None
                for parts, axis in zip(cut, of_leaf, strict=True)
            )
            carry, output = body(carry, layer)
            outputs += [] if output is None else [output]
        return carry, jax.tree.map(lambda *each: jnp.stack(each), *outputs) if outputs else None

    return run


def _in_periods(leaf: jax.Array, size: int) -> jax.Array:
    """Returns an array [layers, ...] as [periods, size, ...]."""
    shape = (leaf.shape[0] // size, size, *leaf.shape[1:])
    stored = layout(leaf)
    out = None if stored is None else P(None, None, *stored[1:])
    return jnp.reshape(leaf, shape, out_sharding=out)
