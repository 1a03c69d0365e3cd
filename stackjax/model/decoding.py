"""Incremental decoding with a KV cache.

Shapes: L layers that a token passes, B batch, T query time, S cache slots, D embed, N query
heads, K key/value heads, H head_dim, V vocabulary (padded). G is N / K: query head n reads key
head n // G.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from stackjax.model.config import ModelConfig
from stackjax.model.layer_kind import LayerKind
from stackjax.model.layer_scan import scan_layers
from stackjax.model.masking import Masking, capped
from stackjax.model.module import compute_dtype
from stackjax.model.transformer import (
    Params,
    block_function,
    embed,
    final_norm,
    layer_axes,
    unembed,
)
from stackjax.sharding.partition import logical


class Cache(NamedTuple):
    """Keys (already rotated) and values of every layer; slot s belongs to position s.

    Heads come before slots, so that matrix products need no transpose.
    """

    keys_LBKSH: jax.Array
    values_LBKSH: jax.Array


def empty_cache(config: ModelConfig, batch: int, capacity: int) -> Cache:
    """Returns a cache for texts of up to `capacity` tokens, in the compute dtype."""
    shape = (config.depth, batch, config.num_kv_heads, capacity, config.head_dim)
    layout = logical(None, "batch", "kv_heads", None, None)
    dtype = compute_dtype(config)
    return Cache(*(jnp.zeros(shape, dtype, out_sharding=layout) for _ in Cache._fields))


def extend(
    config: ModelConfig,
    params: Params,
    cache: Cache,
    tokens_BT: jax.Array,
    positions_BT: jax.Array,
) -> tuple[jax.Array, Cache]:
    """Returns the residual stream of new tokens after the final norm, and the updated cache.

    The stream is [B, T, D], for `next_logits`. A token attends to all slots up to the token's
    position; earlier or current calls must have filled these slots. Later slots have no effect:
    rows may have padding at the end, if later calls overwrite the padding.
    """
    rows = logical("batch", "seq")
    if rows is not None:
        positions_BT = jax.reshard(positions_BT, rows)
    run_block = block_function(config, positions_BT)

    def run_layer(
        carry: tuple[jax.Array, Cache],
        scanned: tuple[Params, jax.Array],
        kind: LayerKind,
    ) -> tuple[tuple[jax.Array, Cache], None]:
        (x_BTD, cache), (layer, index) = carry, scanned

        def attend(
            q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array
        ) -> tuple[jax.Array, Cache]:
            new = Cache(k_BTKH, v_BTKH)
            return _on_each_device(masking, q_BTNH, new, cache, positions_BT, index)

        masking = Masking(kind.window, config.attention_cap)
        return run_block(x_BTD, layer, kind, attend)[:2], None

    def body(kind: LayerKind) -> Any:
        return functools.partial(run_layer, kind=kind)

    def run_loop(
        carry: tuple[jax.Array, Cache], first: jax.Array
    ) -> tuple[tuple[jax.Array, Cache], None]:
        layers = params["layers"], first + jnp.arange(config.num_layers)
        axes = layer_axes(config), "layers"
        return scan_layers(body, carry, layers, config, axes=axes)

    x_BTD = embed(config, params, tokens_BT, positions_BT)
    if config.num_layers:  # an empty cache cannot be indexed, even in a loop of no steps
        # Carry the cache instead of scanning over it, to update it in place.
        firsts = config.num_layers * jnp.arange(config.loops)
        (x_BTD, cache), _ = jax.lax.scan(run_loop, (x_BTD, cache), firsts)
    return final_norm(config, params, x_BTD), cache


def next_logits(
    config: ModelConfig, params: Params, x_BTD: jax.Array, place_B: jax.Array
) -> jax.Array:
    """Returns the next-token logits at one place in each row, [B, V].

    Args:
      x_BTD: The residual stream from `extend`.
    """
    x_B1D = jnp.take_along_axis(x_BTD, place_B[:, None, None], axis=1)
    return jnp.squeeze(unembed(config, params, x_B1D), 1)


def _on_each_device(
    masking: Masking,
    q_BTNH: jax.Array,
    new: Cache,
    cache: Cache,
    positions_BT: jax.Array,
    index: jax.Array,
) -> tuple[jax.Array, Cache]:
    """Returns the result of `_attend`, run on each device's rows and heads."""
    heads: Any = logical("batch", "seq", "heads", None)
    kv_heads: Any = logical("batch", "seq", "kv_heads", None)
    args = q_BTNH, new, cache, positions_BT, index
    attend = functools.partial(_attend, masking)
    if heads is None:
        return attend(*args)
    cached: Any = logical(None, "batch", "kv_heads", None, None)
    caches, added = Cache(cached, cached), Cache(kv_heads, kv_heads)
    specs = heads, added, caches, logical("batch", "seq"), logical()
    return jax.shard_map(attend, in_specs=specs, out_specs=(heads, caches))(*args)


def _attend(
    masking: Masking,
    q_BTNH: jax.Array,
    new: Cache,
    cache: Cache,
    positions_BT: jax.Array,
    index: jax.Array,
) -> tuple[jax.Array, Cache]:
    """Returns the attention output of a layer, [B, T, N, H], and the updated cache.

    Args:
      masking: The window and the logit cap.
      new: Keys and values for the new tokens, [B, T, K, H].
      index: The layer, counted over all loops.
    """
    rows_B1 = np.arange(len(positions_BT))[:, None]
    cache = Cache(
        *(
            old_LBKSH.at[index, rows_B1, :, positions_BT].set(new_BTKH)
            for old_LBKSH, new_BTKH in zip(cache, new, strict=True)
        )
    )
    k_BKSH, v_BKSH = (kept_LBKSH[index] for kept_LBKSH in cache)
    batch, length, _, head_dim = q_BTNH.shape
    grouped = (batch, length, k_BKSH.shape[1], -1, head_dim)
    q_BTKGH = (q_BTNH * head_dim**-0.5).reshape(grouped)
    scores_BKGTS = jnp.einsum(
        "BTKGH,BKSH->BKGTS", q_BTKGH, k_BKSH, preferred_element_type=jnp.float32
    )
    slots_1111S = np.expand_dims(np.arange(k_BKSH.shape[2]), (0, 1, 2, 3))
    scores_BKGTS = capped(scores_BKGTS, masking.cap)
    is_seen_B11TS = masking.is_seen(positions_BT[:, None, None, :, None], slots_1111S)
    scores_BKGTS = jnp.where(is_seen_B11TS, scores_BKGTS, -jnp.inf)
    weights_BKGTS = jax.nn.softmax(scores_BKGTS, axis=-1).astype(v_BKSH.dtype)
    out_BTKGH = jnp.einsum("BKGTS,BKSH->BTKGH", weights_BKGTS, v_BKSH)
    return out_BTKGH.reshape(q_BTNH.shape), cache
