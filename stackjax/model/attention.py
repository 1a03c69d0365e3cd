"""Causal self-attention with rotary positions.

Shapes: B batch, T query time, S key time, N query heads, K key/value heads, H head_dim.
"""

import jax
import jax.numpy as jnp


def rotation(
    positions_BT: jax.Array, head_dim: int, theta: float
) -> tuple[jax.Array, jax.Array]:
    """Returns cosine and sine of each position's angles, float32 [B, T, 1, H / 2].

    Rotary positions of arXiv:2104.09864, in the half-split layout of LLaMA's checkpoints:
    channel i turns with channel i + H / 2.
    """
    exponents = -jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
    frequencies = jnp.expand_dims(theta**exponents, (0, 1, 2))
    angles = positions_BT[:, :, None, None].astype(jnp.float32) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x_BTNH: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Returns queries or keys turned by their positions' angles, in their own type."""
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    turned = (first * cos - second * sin, second * cos + first * sin)
    return jnp.concatenate(turned, axis=-1).astype(x_BTNH.dtype)


def causal_attention(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, segments_BT: jax.Array
) -> jax.Array:
    """Returns attention over earlier positions of the same segment, [B, T, N, H].

    Query head n reads key head n // (N / K); the softmax is float32.
    """
    same_BTS = segments_BT[:, :, None] == segments_BT[:, None, :]
    return jax.nn.dot_product_attention(
        q_BTNH, k_BSKH, v_BSKH, mask=same_BTS[:, None], is_causal=True
    )
