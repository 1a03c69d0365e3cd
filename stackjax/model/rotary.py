"""Rotary positions (arXiv:2104.09864).

Shapes: B batch, T time, N heads, H head_dim.
"""

import math

import jax
import jax.numpy as jnp

from stackjax.model.layer_kind import RopeScaling


def rotation(
    positions_BT: jax.Array, head_dim: int, theta: float, scaling: RopeScaling | None = None
) -> tuple[jax.Array, jax.Array]:
    """Returns cosine and signed sine for rotary positions (arXiv:2104.09864), [B, T, 1, H].

    The sine of the first half of the channels is negative. With YaRN, both have its factor.
    """
    frequencies = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    if scaling is not None:
        frequencies *= _frequency_scale(scaling, frequencies, theta)
    frequencies = jnp.expand_dims(frequencies, (0, 1, 2))
    angles = positions_BT[:, :, None, None].astype(jnp.float32) * frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    if scaling is not None and scaling.method == "yarn":
        factor = scaling.attention_factor or 0.1 * math.log(scaling.factor) + 1
        cos, sin = factor * cos, factor * sin
    return jnp.concatenate([cos, cos], axis=-1), jnp.concatenate([-sin, sin], axis=-1)


def _frequency_scale(scaling: RopeScaling, frequencies: jax.Array, theta: float) -> jax.Array:
    """Returns the factors on the rotary frequencies, [H / 2]."""
    if scaling.method == "linear":
        return jnp.full_like(frequencies, 1 / scaling.factor)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    if scaling.method == "yarn":
        kept = _kept_by_yarn(scaling, len(frequencies), theta)
        return kept + (1 - kept) / scaling.factor
    turns = scaling.original_seq_len * frequencies / (2 * math.pi)
    kept = jnp.clip((turns - low) / (high - low), 0.0, 1.0)
    return kept + (1 - kept) / scaling.factor


def _kept_by_yarn(scaling: RopeScaling, half: int, theta: float) -> jax.Array:
    """Returns the share of each frequency that is not divided in YaRN, [H / 2].

    It is 1 for the first channels and 0 for the last, and linear in between (arXiv:2309.00071,
    by channels as in transformers).
    """

    def channel(turns: float) -> float:
        """Returns the channel with so many turns per original context, a real number."""
        return half * math.log(scaling.original_seq_len / (turns * 2 * math.pi), theta)

    first, last = channel(scaling.high_freq_factor), channel(scaling.low_freq_factor)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, 2 * half - 1)
    if first == last:
        last += 1e-3
    return 1 - jnp.clip(
        (jnp.arange(half, dtype=jnp.float32) - first) / (last - first), 0.0, 1.0
    )


def rotate(x_BTNH: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Returns queries or keys rotated by rotary angles, in the input dtype.

    Channels without angles stay.

    Args:
      cos, sin: As from `rotation`.
    """
    turned = cos.shape[-1]
    if turned == x_BTNH.shape[-1]:
        return _rotate(x_BTNH, cos, sin)
    rotated = _rotate(x_BTNH[..., :turned], cos, sin)
    return jnp.concatenate([rotated, x_BTNH[..., turned:]], axis=-1)


@jax.custom_vjp
def _rotate(x_BTNH: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Returns `rotate` for angles in all channels.

    As in LLaMA checkpoints, channel i is paired with channel i + H / 2.
    """
    wide, other = x_BTNH.astype(jnp.float32), _halves_exchanged(x_BTNH).astype(jnp.float32)
    return (wide * cos + other * sin).astype(x_BTNH.dtype)


def _halves_exchanged(x_BTNH: jax.Array) -> jax.Array:
    """Returns the second half of the channels, then the first half.

    The compiler computes pads inside the operations that read them. It would write slices and
    concatenations to memory: on TPU v5e, a 1.1B step would have 1.4 times the elementwise
    traffic.
    """
    half, zero = x_BTNH.shape[-1] // 2, jnp.zeros((), x_BTNH.dtype)
    first, second = (
        jax.lax.pad(x_BTNH, zero, [(0, 0, 0)] * 3 + [(by, -by, 0)]) for by in (half, -half)
    )
    return first + second


def _forward(
    x_BTNH: jax.Array, cos: jax.Array, sin: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _rotate(x_BTNH, cos, sin), (cos, sin)


def _backward(
    turn: tuple[jax.Array, jax.Array], g_BTNH: jax.Array
) -> tuple[jax.Array, None, None]:
    # The transpose of a rotation turns back.
    cos, sin = turn
    return _rotate(g_BTNH, cos, -sin), None, None


_rotate.defvjp(_forward, _backward)
