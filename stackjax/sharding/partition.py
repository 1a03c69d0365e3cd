"""The one table from logical axis names to mesh axes, and partitions by it."""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from stackjax.sharding.axes import Axes

RULES: dict[str, str | tuple[str, ...]] = {
    "batch": ("replica", "fsdp"),
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
}
"""Mesh axes that shard a logical axis; an axis that is not named here is whole."""


def logical(*names: str | None) -> P | None:
    """Returns the partition of an array with these logical axes.

    None outside a mesh, and on one whose axes the compiler lays out by itself. Activations
    name `embed` as None: the residual stream is whole on every device, only parameters are
    sharded along it.
    """
    if not _is_explicit(jax.sharding.get_abstract_mesh()):
        return None
    return P(*(RULES.get(name) if name else None for name in names))


def partition(axes: Axes) -> P | None:
    """Returns the partition of a parameter; gains and other vectors stay whole."""
    return logical(*axes.names) if axes.reads else logical(*(None,) * len(axes.names))


def layout(x: jax.Array) -> P | None:
    """Returns the partition in the type of an array; None where `logical` has none."""
    is_explicit = _is_explicit(jax.sharding.get_abstract_mesh())
    return jax.typeof(x).sharding.spec if is_explicit else None


def whole_along(name: str, spec: P) -> P:
    """Returns a partition without the shards along a logical axis."""
    return P(*(None if axis == RULES[name] else axis for axis in spec))


def on_mesh(abstract: Any, mesh: Mesh) -> Any:
    """Returns a tree of abstract arrays with their partitions on a mesh of devices."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, partition_of(leaf))
        ),
        abstract,
    )


def move(tree: Any, mesh: Mesh) -> Any:
    """Returns a tree of arrays on a mesh, with the partitions that they have.

    What is there already is not copied.
    """
    return jax.tree.map(
        lambda leaf: jax.device_put(leaf, NamedSharding(mesh, partition_of(leaf))), tree
    )


def laid_out(function: Callable[..., Any], layout: Any) -> Callable[..., Any]:
    """Returns a function inside which the compiler lays out every array.

    Args:
      layout: The partitions of what it returns.
    """
    return jax.sharding.auto_axes(function, out_sharding=layout)


def partition_of(leaf: jax.Array | jax.ShapeDtypeStruct) -> P:
    """Returns the partition of an array; scalars that no mesh has seen are whole."""
    return P() if leaf.sharding is None else leaf.sharding.spec  # type: ignore


def num_shards(name: str) -> int:
    """Returns over how many devices the current mesh splits a logical axis.

    1 where the compiler lays out the axes by itself.
    """
    mesh = jax.sharding.get_abstract_mesh()
    rule = RULES.get(name, ())
    axes = (rule,) if isinstance(rule, str) else rule
    return math.prod(mesh.shape[axis] for axis in axes) if _is_explicit(mesh) else 1


def _is_explicit(mesh: jax.sharding.AbstractMesh) -> bool:
    return not mesh.empty and AxisType.Auto not in mesh.axis_types
