"""Rotary positions (arXiv:2104.09864).

Shapes: B batch, T time, N heads, H head_dim.
"""

import math

import jax
import jax.numpy as jnp

from stackjax.model.config import RopeScaling


def rotation(
    positions_BT: jax.Array, head_dim: int, theta: float, scaling: RopeScaling | None = None
) -> tuple[jax.Array, jax.Array]:
    """Returns cosine and sine for rotary positions (arXiv:2104.09864), [B, T, 1, H / 2]."""
    frequencies = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    if scaling is not None:
        frequencies *= _frequency_scale(scaling, frequencies)
    frequencies = jnp.expand_dims(frequencies, (0, 1, 2))
    angles = positions_BT[:, :, None, None].astype(jnp.float32) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def _frequency_scale(scaling: RopeScaling, frequencies: jax.Array) -> jax.Array:
    """Returns the factors on the rotary frequencies, [H / 2]."""
    turns = scaling.original_seq_len * frequencies / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = jnp.clip((turns - low) / (high - low), 0.0, 1.0)
    return kept + (1 - kept) / scaling.factor


def rotate(x_BTNH: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Returns queries or keys rotated by rotary angles, in the input dtype.

    As in LLaMA checkpoints, channel i is paired with channel i + H / 2.
    """
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    turned = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(turned, axis=-1).astype(x_BTNH.dtype)
