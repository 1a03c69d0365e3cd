"""The table from logical axes to mesh axes, and partition specs from this table."""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from stackjax.sharding.axes import Axes

RULES: dict[str, str | tuple[str, ...]] = {
    "batch": ("replica", "fsdp", "expert"),
    "seq": "context",
    "embed": ("fsdp", "context", "expert"),
    "heads": "tensor",
    "kv_heads": "tensor",
    # Attention reads whole sequences: each device then has some of the heads.
    "attention_heads": ("tensor", "context"),
    # A device looks up its channels of the embedding for all tokens in its replica.
    "lookup_batch": "replica",
    "lookup_embed": ("fsdp", "expert"),
    "mlp": "tensor",
    # The router's `experts` come after `embed`, which `expert` splits: they stay whole.
    "experts": "expert",
    "expert_mlp": "tensor",
    "vocab": "tensor",
}
"""Mesh axes for each logical axis.

Model code gives every array dimension a logical name, such as "batch" or "heads". The device
mesh has the axes `replica`, `fsdp`, `context`, `tensor` and, with shards of the experts,
`expert`. This table maps logical names to mesh axes; a dimension is split over these mesh axes.
A dimension without mesh axes is not split. To shard another dimension, change the table. A mesh
axis splits a single dimension of an array, the first one that it is for.
"""


def logical(*names: str | None) -> P | None:
    """Returns the partition spec for logical axes; an axis named None is not sharded.

    Activations pass None for `embed`: only parameters are sharded along `embed`, the residual
    stream is not. Without a mesh, or with automatic mesh axes, the result is None.
    """
    if not _is_explicit(jax.sharding.get_abstract_mesh()):
        return None
    entries, taken = [], ()
    for name in names:
        entries.append(_mesh_axes(name, taken) if name else None)
        taken += mesh_axes_in(P(entries[-1]))
    return P(*entries)


def mesh_axes_in(spec: P) -> tuple[str, ...]:
    """Returns all mesh axes in a partition spec, in order."""
    return tuple(jax.tree.leaves(tuple(spec)))


def _mesh_axes(name: str, taken: tuple[str, ...] = ()) -> str | tuple[str, ...] | None:
    """Returns the explicit mesh axes of a logical axis, without those that are taken."""
    rule = RULES.get(name, ())
    axes = (rule,) if isinstance(rule, str) else rule
    mesh = jax.sharding.get_abstract_mesh()
    left = tuple(axis for axis in axes if axis in mesh.explicit_axes and axis not in taken)
    if left == ("context",) and mesh.shape["context"] == 1:
        # A product of queries and keys would have this mesh axis twice, which JAX refuses.
        return None
    return left[0] if len(left) == 1 else left or None


def partition(axes: Axes) -> P | None:
    """Returns the partition spec for a parameter; norm gains and biases are replicated."""
    return logical(*axes.names) if axes.reads else logical(*(None,) * len(axes.names))


def layout(x: jax.Array) -> P | None:
    """Returns the partition spec in an array's type; None where `logical` returns None."""
    is_explicit = _is_explicit(jax.sharding.get_abstract_mesh())
    return jax.typeof(x).sharding.spec if is_explicit else None


def unsharded_along(name: str, spec: P) -> P:
    """Returns a partition spec without sharding along a logical axis."""
    return P(*(None if axis == _mesh_axes(name) else axis for axis in spec))


def resharded(x: jax.Array, spec: P | None) -> jax.Array:
    """Returns an array with a partition spec; the array itself for None."""
    return x if spec is None else jax.reshard(x, spec)


def on_mesh(abstract: Any, mesh: Mesh) -> Any:
    """Returns a tree of abstract arrays, with the same partition specs on a device mesh."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, partition_of(leaf))
        ),
        abstract,
    )


def move(tree: Any, mesh: Mesh) -> Any:
    """Returns a tree with all arrays moved to a mesh, with the same partition specs.

    Arrays on the mesh already are not copied.
    """
    return jax.tree.map(
        lambda leaf: jax.device_put(leaf, NamedSharding(mesh, partition_of(leaf))), tree
    )


def auto_sharded(
    function: Callable[..., Any], layout: Any, axes: str | None = None
) -> Callable[..., Any]:
    """Returns a function with automatic sharding inside.

    Args:
      layout: Partition specs of the results.
      axes: The mesh axis with automatic sharding; by default all axes.
    """
    return jax.sharding.auto_axes(function, axes=axes, out_sharding=layout)


def partition_of(leaf: jax.Array | jax.ShapeDtypeStruct) -> P:
    """Returns an array's partition spec; arrays without a mesh are replicated."""
    return P() if leaf.sharding is None else leaf.sharding.spec  # type: ignore


def num_shards(name: str) -> int:
    """Returns the number of shards along a logical axis on the current mesh.

    With automatic mesh axes the result is 1.
    """
    mesh = jax.sharding.get_abstract_mesh()
    found = _mesh_axes(name) or ()
    axes = (found,) if isinstance(found, str) else found
    return math.prod(mesh.shape[axis] for axis in axes) if _is_explicit(mesh) else 1


def _is_explicit(mesh: jax.sharding.AbstractMesh) -> bool:
    return AxisType.Explicit in mesh.axis_types
