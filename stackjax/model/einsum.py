"""Einsums of activations with sharded float32 weights.

Shapes follow the caller's einsum, such as `BTD,DNH->BTNH`.
"""

import functools
import string
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from stackjax.sharding.partition import layout, num_shards, unsharded_along

PRODUCT = "product"
"""Checkpoint name of matrix products with weights, for remat policies."""
MLP_PRODUCT = "mlp_product"
"""Checkpoint name of the products with `mlp_dim` channels, the largest of a layer."""


def gathered(w: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Returns a weight in the dtype of the product, all-gathered along `embed`."""
    stored = layout(w)
    w = w.astype(dtype)
    return w if stored is None else jax.reshard(w, unsharded_along("embed", stored))


def contract(
    spec: str, x: jax.Array, w: jax.Array, out_sharding: P | None, name: str = PRODUCT
) -> jax.Array:
    """Returns the einsum of activations and a weight, in the activations' dtype.

    The weight is cast and all-gathered along `embed` for the forward pass, and again for the
    backward pass, so no gathered weight stays in memory. The weight's gradient is accumulated
    in the stored dtype and reduce-scattered to the stored shards.

    Args:
      name: Checkpoint name of the product.
    """
    product: Any = _contract(spec, x, w, out_sharding)
    return checkpoint_name(product, name)


def contract_gradients(
    spec: str, x: jax.Array, w: jax.Array, g: jax.Array, whole: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Returns the gradients of `contract` for `x` and `w`, given the output gradient `g`.

    Args:
      whole: `w` as from `gathered`; by default `w` is gathered again.
    """
    of_x, of_w, of_g = spec.replace("->", ",").split(",")
    x_layout, w_layout = layout(x), layout(w)
    if whole is None:
        # Without the barrier, the compiler keeps the gathered weights of all layers.
        again = jax.lax.optimization_barrier(w) if num_shards("embed") > 1 else w
        whole = gathered(again, x.dtype)
    x_gradient = _einsum(f"{of_g},{of_w}->{of_x}", g, whole, out_sharding=x_layout)
    if x.dtype == w.dtype:
        # A product over tokens transposes the first operand: let it be the smaller one.
        is_x_first = x.size <= g.size
    else:
        # On a CPU, XLA has no transposed product for bfloat16.
        is_x_first = of_w[0] in of_x
    first, second, ordered = (of_x, of_g, (x, g)) if is_x_first else (of_g, of_x, (g, x))
    of_sum = "".join(axis for axis in first + second if axis in of_w)
    sum_layout = None
    if w_layout is not None:
        sum_layout = P(*(w_layout[of_w.index(axis)] for axis in of_sum))
    w_gradient = _einsum(
        f"{first},{second}->{of_sum}",
        *ordered,
        preferred_element_type=w.dtype,
        out_sharding=sum_layout,
    )
    if of_sum != of_w:
        # The barrier keeps the transpose out of the product, at twice the speed.
        w_gradient = jnp.einsum(f"{of_sum}->{of_w}", jax.lax.optimization_barrier(w_gradient))
    return x_gradient, w_gradient


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def _contract(spec: str, x: jax.Array, w: jax.Array, out_sharding: P | None) -> jax.Array:
    return _einsum(spec, x, gathered(w, x.dtype), out_sharding=out_sharding)


def _forward(
    spec: str, x: jax.Array, w: jax.Array, out_sharding: P | None
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    product: Any = _contract(spec, x, w, out_sharding)
    return product, (x, w)


def _backward(
    spec: str, out_sharding: P | None, kept: tuple[jax.Array, jax.Array], g: jax.Array
) -> tuple[jax.Array, jax.Array]:
    return contract_gradients(spec, *kept, g)


_contract.defvjp(_forward, _backward)


def _einsum(spec: str, *operands: jax.Array, **options: Any) -> jax.Array:
    """Returns an einsum with the summed axes in memory order.

    JAX orders summed axes by letter; for heads (N) and head channels (H), XLA would then copy
    the operands into another memory order.
    """
    axes = dict.fromkeys(spec.replace("->", "").replace(",", ""))
    in_order = str.maketrans(dict(zip(axes, string.ascii_lowercase, strict=False)))
    with jax.named_scope(spec):
        return jnp.einsum(spec.translate(in_order), *operands, **options)
