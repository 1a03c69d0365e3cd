"""Gradients summed over microbatches and replicas."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from stackjax.data.batch import Batch
from stackjax.model import Params
from stackjax.sharding.partition import auto_sharded, logical
from stackjax.sharding.partition import layout as layout_of

Gradient = Callable[[Params, jax.Array, Batch], tuple[Params, jax.Array]]
"""Returns gradient and loss of a microbatch: (params, tokens, microbatch)."""


def sum_gradients(
    gradient: Gradient, params: Params, tokens: jax.Array, batch: Batch
) -> tuple[jax.Array, Params]:
    """Returns loss and gradient, summed over microbatches and replicas.

    With several microbatches, each replica first sums its own: gradients cross the network
    between replicas once per step, not once per microbatch.
    """
    mesh = jax.sharding.get_abstract_mesh()
    replicas = 1 if mesh.empty else mesh.shape["replica"]
    if replicas == 1 or batch.tokens.shape[0] == 1:
        return _accumulate(gradient, params, tokens, batch)

    def split(field: jax.Array) -> jax.Array:
        num_microbatches, rows, *shape = field.shape
        layout = logical(None, None, "batch", *("seq",) * len(shape))
        by_replica = (num_microbatches, replicas, rows // replicas, *shape)
        split = jnp.reshape(field, by_replica, out_sharding=layout)
        return jax.lax.with_sharding_constraint(split, P(None, "replica"))

    def sums(params: Params, tokens: jax.Array, batch: Batch) -> tuple[jax.Array, Params]:
        accumulate = functools.partial(_accumulate, gradient)
        by_replica = jax.vmap(accumulate, in_axes=(None, None, 1), spmd_axis_name="replica")
        sums = by_replica(params, tokens, jax.tree.map(split, batch))
        return jax.tree.map(lambda each: jnp.sum(each, axis=0), sums)

    layout = P(), jax.tree.map(layout_of, params)
    return auto_sharded(sums, layout, axes="replica")(params, tokens, batch)


def _accumulate(
    gradient: Gradient, params: Params, tokens: jax.Array, batch: Batch
) -> tuple[jax.Array, Params]:
    """Returns loss and gradient, summed over microbatches."""
    if batch.tokens.shape[0] == 1:
        grads, loss = gradient(params, tokens, jax.tree.map(lambda field: field[0], batch))
        return loss, grads

    def add(
        sums: tuple[jax.Array, Params], microbatch: Batch
    ) -> tuple[tuple[jax.Array, Params], None]:
        grads, loss = gradient(params, tokens, microbatch)
        return jax.tree.map(jnp.add, sums, (loss, grads)), None

    # Every microbatch is an iteration, the first too: two microbatches outside of the loop
    # would have their activations in memory at the same time.
    loss = jnp.zeros((), jnp.float32, out_sharding=logical())
    sums, _ = jax.lax.scan(add, (loss, jax.tree.map(jnp.zeros_like, params)), batch)
    return sums
