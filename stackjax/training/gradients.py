"""Gradients summed over microbatches and replicas."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from stackjax.data.batch import Batch
from stackjax.model import Params
from stackjax.sharding.partition import auto_sharded, logical
from stackjax.sharding.partition import layout as layout_of

Gradient = Callable[[Params, jax.Array, Batch], tuple[Params, Any]]
"""Returns gradient and sums of a microbatch: (params, tokens, microbatch)."""

LOSS = jax.ShapeDtypeStruct((), jnp.float32)
"""The sums of a model without experts: its loss."""


def sum_gradients(
    gradient: Gradient, params: Params, tokens: jax.Array, batch: Batch, like: Any = LOSS
) -> tuple[Any, Params]:
    """Returns sums and gradient, summed over microbatches and replicas.

    With several microbatches, each replica first sums its own: gradients cross the network
    between replicas once per step, not once per microbatch.

    Args:
      like: Shapes and types of the sums.
    """
    mesh = jax.sharding.get_abstract_mesh()
    replicas = 1 if mesh.empty else mesh.shape["replica"]
    if replicas == 1 or batch.tokens.shape[0] == 1:
        return _accumulate(gradient, like, params, tokens, batch)

    def split(field: jax.Array) -> jax.Array:
        num_microbatches, rows, *shape = field.shape
        layout = logical(None, None, "batch", *("seq",) * len(shape))
        by_replica = (num_microbatches, replicas, rows // replicas, *shape)
        split = jnp.reshape(field, by_replica, out_sharding=layout)
        return jax.lax.with_sharding_constraint(split, P(None, "replica"))

    def sums(params: Params, tokens: jax.Array, batch: Batch) -> tuple[Any, Params]:
        accumulate = functools.partial(_accumulate, gradient, like)
        by_replica = jax.vmap(accumulate, in_axes=(None, None, 1), spmd_axis_name="replica")
        sums = by_replica(params, tokens, jax.tree.map(split, batch))
        return jax.tree.map(lambda each: jnp.sum(each, axis=0), sums)

    layout = jax.tree.map(lambda _: P(), like), jax.tree.map(layout_of, params)
    return auto_sharded(sums, layout, axes="replica")(params, tokens, batch)


def _accumulate(
    gradient: Gradient, like: Any, params: Params, tokens: jax.Array, batch: Batch
) -> tuple[Any, Params]:
    """Returns sums and gradient, summed over microbatches."""
    if batch.tokens.shape[0] == 1:
        grads, found = gradient(params, tokens, jax.tree.map(lambda field: field[0], batch))
        return found, grads

    def add(sums: tuple[Any, Params], microbatch: Batch) -> tuple[tuple[Any, Params], None]:
        grads, found = gradient(params, tokens, microbatch)
        return jax.tree.map(jnp.add, sums, (found, grads)), None

    # Every microbatch is an iteration, the first too: two microbatches outside of the loop
    # would have their activations in memory at the same time.
    zeros = jax.tree.map(_zeros, like)
    sums, _ = jax.lax.scan(add, (zeros, jax.tree.map(jnp.zeros_like, params)), batch)
    return sums


def _zeros(like: jax.ShapeDtypeStruct) -> jax.Array:
    layout = logical(*(None,) * len(like.shape))
    return jnp.zeros(like.shape, like.dtype, out_sharding=layout)
