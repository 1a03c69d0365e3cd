"""Causal self-attention, using the fastest available kernel.

Shapes: B batch, T query time, S key time, N query heads, K key/value heads, H head_dim. G is
N / K: query head n reads key head n // G.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from stackjax.model.attention_kernels import (
    FLASH_KERNELS,
    SPLASH_LANES,
    has_kernel,
    on_each_device,
)
from stackjax.model.block_attention import block_attention
from stackjax.model.config import AttentionKernel, ModelConfig
from stackjax.model.context_attention import (
    attention_by_heads,
    attention_by_queries,
    query_pieces,
)
from stackjax.model.masking import ANY_PAST, Masking
from stackjax.sharding.partition import logical, num_shards
from stackjax.sharding.platform import target_device


def choose_kernel(config: ModelConfig, dtype: jnp.dtype, seq_len: int) -> AttentionKernel:
    """Returns the configured kernel; for "auto", the fastest for this dtype and length."""
    if config.attention != "auto":
        return config.attention
    device = target_device()
    # On all GPUs since Ampere, cuDNN supports bfloat16, at most 128 channels per head, and
    # masks with an even length. It has no logit cap.
    narrow = dtype == jnp.bfloat16 and config.head_dim % 8 == 0 and config.head_dim <= 128
    narrow = narrow and config.attention_cap is None
    pieces = query_pieces(config.num_kv_heads)
    if narrow and seq_len % (2 * pieces) == 0 and has_kernel("cudnn", device):
        return "cudnn"
    # Splash attention also needs the square of the number of shards to divide the length.
    fits_splash = seq_len % math.lcm(SPLASH_LANES * pieces, pieces**2) == 0
    if fits_splash and has_kernel("splash", device):
        return "splash"
    return "xla"


def causal_attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    segments_BT: jax.Array | None,
    kernel: AttentionKernel,
    masking: Masking = ANY_PAST,
) -> jax.Array:
    """Returns causal attention within each segment, [B, T, N, H], with a float32 softmax.

    Args:
      segments_BT: None if each row is a single segment.
      kernel: As from `choose_kernel`.
      masking: The window and the logit cap.
    """
    args = q_BTNH, k_BSKH, v_BSKH, segments_BT
    masking = masking.within(q_BTNH.shape[1])
    if query_pieces(k_BSKH.shape[2]) > 1:
        return attention_by_queries(kernel, *args, masking)
    attend = functools.partial(FLASH_KERNELS.get(kernel, _xla), masking=masking)
    if num_shards("seq") > 1:
        return attention_by_heads(attend, *args)
    if kernel == "xla":
        return attend(*args)
    return on_each_device(attend)(*args)


def _xla(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    segments_BT: jax.Array | None,
    *,
    masking: Masking,
) -> jax.Array:
    batch, seq_len, num_heads, head_dim = q_BTNH.shape
    num_kv_heads = k_BSKH.shape[2]
    grouped = (batch, seq_len, num_kv_heads, num_heads // num_kv_heads, head_dim)
    # In JAX 0.11, reshape loses the sharding along axes with length 1.
    layout = logical("batch", "seq", "kv_heads", None, None)
    q_BTKGH = jnp.reshape(q_BTNH * head_dim**-0.5, grouped, out_sharding=layout)
    q_BKHGT = q_BTKGH.transpose(0, 2, 4, 3, 1)
    k_BKSH, v_BKSH = k_BSKH.transpose(0, 2, 1, 3), v_BSKH.transpose(0, 2, 1, 3)
    out_BKHGT: Any = block_attention(q_BKHGT, k_BKSH, v_BKSH, segments_BT, masking)
    layout = logical("batch", "seq", "heads", None)
    return jnp.reshape(out_BKHGT.transpose(0, 4, 1, 3, 2), q_BTNH.shape, out_sharding=layout)
