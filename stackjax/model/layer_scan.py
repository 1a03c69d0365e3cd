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
    wrap: Callable[[Any, bool], Any] = lambda body, _: body,
) -> tuple[Carry, Any]:
    """Returns the carry after all layers and the stacked outputs, as `jax.lax.scan`.

    Args:
      run_layer: Returns the scan's body for a kind.
      layers: Arrays with a leading axis of layers.
      first: The model's layer that is first in `layers`.
      unroll: Layers per iteration, rounded down to whole periods, at least one.
      wrap: Returns a body to run instead of a body. Its second argument is whether the body's
        loop has a single iteration, which the compiler inlines.
    """
    outputs, runs = [], _runs(config, first, jax.tree.leaves(layers)[0].shape[0])
    for run in runs:
        part = layers
        if len(runs) > 1:
            part = jax.tree.map(lambda leaf: leaf[run.start : run.stop], layers)  # noqa: B023
        length, size = run.stop - run.start, len(run.kinds)
        steps = max(1, min(unroll, length) // size)
        bodies = [wrap(run_layer(kind), steps * size >= length) for kind in run.kinds]
        if size == 1:
            carry, output = jax.lax.scan(bodies[0], carry, part, unroll=steps)
        else:
            periods = jax.tree.map(lambda leaf: _in_periods(leaf, size), part)  # noqa: B023
            carry, output = jax.lax.scan(_period(bodies), carry, periods, unroll=steps)
            output = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), output)
        outputs.append(output)
    if len(outputs) == 1:
        return carry, outputs[0]
    return carry, jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *outputs)


def _period(
    bodies: Sequence[Callable[[Carry, Any], tuple[Carry, Any]]],
) -> Callable[[Carry, Any], tuple[Carry, Any]]:
    """Returns a scan's body for a period, from one for each layer."""

    def run(carry: Carry, layers: Any) -> tuple[Carry, Any]:
        leaves, tree = jax.tree.flatten(layers)
        # A split's transpose is a concatenation; indexing would add padded arrays.
        cut = [jax.lax.split(leaf, [1] * len(bodies)) for leaf in leaves]
        outputs = []
        for i, body in enumerate(bodies):
            layer = tree.unflatten([jnp.squeeze(parts[i], 0) for parts in cut])
            carry, output = body(carry, layer)
            outputs.append(output)
        return carry, jax.tree.map(lambda *each: jnp.stack(each), *outputs)

    return run


def _in_periods(leaf: jax.Array, size: int) -> jax.Array:
    """Returns an array [layers, ...] as [periods, size, ...]."""
    shape = (leaf.shape[0] // size, size, *leaf.shape[1:])
    stored = layout(leaf)
    out = None if stored is None else P(None, None, *stored[1:])
    return jnp.reshape(leaf, shape, out_sharding=out)
