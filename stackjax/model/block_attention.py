"""Causal attention in plain XLA operations, by blocks of queries.

A block only attends to keys up to the block's end, and with a window only to keys from the
window of its first query, so most masked logits are never computed.
The backward pass reuses the unnormalized softmax weights, and computes the softmax correction
from the output, as in flash attention (arXiv:2205.14135).

Shapes: B batch, T query time, S key time, K key/value heads, H head_dim. G query heads share a
key head. The axis order (keys before queries, channels before query time) avoids transposes of
arrays as large as the attention weights.
"""

import functools
import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from stackjax.model.masking import Masking

_MAX_BLOCKS = 4
_MIN_BLOCK = 64
_MAX_WINDOW_BLOCKS = 16

_Residuals = tuple[
    jax.Array,
    jax.Array,
    jax.Array,
    Sequence[jax.Array],
    Sequence[jax.Array | None],
    jax.Array,
    jax.Array,
]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def block_attention(
    q_BKHGT: jax.Array,
    k_BKSH: jax.Array,
    v_BKSH: jax.Array,
    segments_BT: jax.Array | None,
    masking: Masking,
) -> jax.Array:
    """Returns causal attention within each segment, [B, K, H, G, T], with a float32 softmax.

    Args:
      q_BKHGT: Queries, already scaled.
      segments_BT: None if each row is a single segment.
      masking: The window and the logit cap.
    """
    return _forward(q_BKHGT, k_BKSH, v_BKSH, segments_BT, masking)[0]


def _forward(
    q_BKHGT: jax.Array,
    k_BKSH: jax.Array,
    v_BKSH: jax.Array,
    segments_BT: jax.Array | None,
    masking: Masking,
) -> tuple[jax.Array, _Residuals]:
    weights, slopes, sums, outs = [], [], [], []
    v_BKHS = v_BKSH.transpose(0, 1, 3, 2)
    for block in _blocks(q_BKHGT.shape[-1], masking):
        past = _keys(block, masking)
        logits_BKSGT = jnp.einsum(
            "BKSH,BKHGT->BKSGT",
            k_BKSH[:, :, past],
            q_BKHGT[..., block],
            preferred_element_type=jnp.float32,
        )
        slope_BKSGT = None
        if masking.cap is not None:
            share_BKSGT = jnp.tanh(logits_BKSGT / masking.cap)
            logits_BKSGT = masking.cap * share_BKSGT
            slope_BKSGT = 1 - jnp.square(share_BKSGT)
        is_seen = _is_seen(block, segments_BT, masking)
        logits_BKSGT = jnp.where(is_seen, logits_BKSGT, -jnp.inf)
        largest_BK1GT = jnp.max(logits_BKSGT, axis=2, keepdims=True)
        weights_BKSGT = jnp.exp(logits_BKSGT - largest_BK1GT)
        sum_BK1GT = jnp.sum(weights_BKSGT, axis=2, keepdims=True)
        weights_BKSGT = weights_BKSGT.astype(v_BKSH.dtype)
        out_BKHGT = jnp.einsum(
            "BKHS,BKSGT->BKHGT",
            v_BKHS[..., past],
            weights_BKSGT,
            preferred_element_type=jnp.float32,
        )
        weights.append(weights_BKSGT)
        slopes.append(slope_BKSGT)
        sums.append(sum_BK1GT)
        outs.append((out_BKHGT / sum_BK1GT).astype(q_BKHGT.dtype))
    sum_BK1GT, out_BKHGT = jnp.concatenate(sums, axis=-1), jnp.concatenate(outs, axis=-1)
    return out_BKHGT, (q_BKHGT, k_BKSH, v_BKSH, weights, slopes, sum_BK1GT, out_BKHGT)


def _backward(
    masking: Masking, residuals: _Residuals, g_BKHGT: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    q_BKHGT, k_BKSH, v_BKSH, weights, slopes, sum_BK1GT, out_BKHGT = residuals
    wide_BKHGT = g_BKHGT.astype(jnp.float32) / sum_BK1GT
    pull_BK1GT = jnp.sum(wide_BKHGT * out_BKHGT, axis=2, keepdims=True)
    g_BKHGT = wide_BKHGT.astype(g_BKHGT.dtype)
    by_q, by_k, by_v = [], [], []
    k_BKHS = k_BKSH.transpose(0, 1, 3, 2)
    blocks = _blocks(q_BKHGT.shape[-1], masking)
    for block, weights_BKSGT, slope_BKSGT in zip(blocks, weights, slopes, strict=True):
        past = _keys(block, masking)
        by_weights_BKSGT = jnp.einsum(
            "BKSH,BKHGT->BKSGT",
            v_BKSH[:, :, past],
            g_BKHGT[..., block],
            preferred_element_type=jnp.float32,
        )
        by_logits_BKSGT = weights_BKSGT * (by_weights_BKSGT - pull_BK1GT[..., block])
        if slope_BKSGT is not None:
            by_logits_BKSGT *= slope_BKSGT
        by_logits_BKSGT = by_logits_BKSGT.astype(q_BKHGT.dtype)
        by_q.append(jnp.einsum("BKHS,BKSGT->BKHGT", k_BKHS[..., past], by_logits_BKSGT))
        by_k.append(_sum_over_queries(by_logits_BKSGT, q_BKHGT[..., block]))
        by_v.append(_sum_over_queries(weights_BKSGT, g_BKHGT[..., block]))
    keys = [_keys(block, masking) for block in blocks]
    return (
        jnp.concatenate(by_q, axis=-1),
        _sum_over_blocks(by_k, keys).astype(k_BKSH.dtype),
        _sum_over_blocks(by_v, keys).astype(v_BKSH.dtype),
        None,
    )


block_attention.defvjp(_forward, _backward)


def _blocks(seq_len: int, masking: Masking) -> list[slice]:
    """Returns the query range of each block; with a window, blocks are about as long."""
    size = -(-seq_len // _MAX_BLOCKS)
    if masking.window is not None:
        size = max(min(size, masking.window), -(-seq_len // _MAX_WINDOW_BLOCKS))
    size = max(_MIN_BLOCK, size)
    return [slice(start, min(start + size, seq_len)) for start in range(0, seq_len, size)]


def _keys(block: slice, masking: Masking) -> slice:
    """Returns the key range that any query in a block attends to."""
    return slice(masking.first_key(block.start), block.stop)


def _is_seen(block: slice, segments_BT: jax.Array | None, masking: Masking) -> jax.Array:
    """Returns a block's attention mask, [B, 1, S, 1, T], over the block's keys."""
    keys = _keys(block, masking)
    key_S1 = jnp.arange(keys.start, keys.stop)[:, None]
    query_1T = jnp.arange(block.start, block.stop)[None, :]
    is_seen_BST = masking.is_seen(query_1T, key_S1)[None]
    if segments_BT is not None:
        is_seen_BST &= segments_BT[:, keys, None] == segments_BT[:, None, block]
    return is_seen_BST[:, None, :, None]


def _sum_over_queries(x_BKSGT: jax.Array, y_BKHGT: jax.Array) -> jax.Array:
    return jnp.einsum("BKSGT,BKHGT->BKSH", x_BKSGT, y_BKHGT, preferred_element_type=jnp.float32)


def _sum_over_blocks(parts: Sequence[jax.Array], keys: Sequence[slice]) -> jax.Array:
    """Returns the sum over blocks, [B, K, S, H].

    Args:
      keys: The range of S in each part.
    """
    cuts = sorted({0, *(i for part in keys for i in (part.start, part.stop))})
    sums = [
        sum(
            part[:, :, start - held.start : stop - held.start]
            for part, held in zip(parts, keys, strict=True)
            if held.start <= start and stop <= held.stop
        )
        for start, stop in itertools.pairwise(cuts)
    ]
    return jnp.concatenate(sums, axis=2)
