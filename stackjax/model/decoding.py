"""The decoder a few tokens at a time: what came before is kept as keys and values.

Shapes: L layers, B batch, T query time, S slots of the cache, D embed, N query heads, K
key/value heads, H head_dim, V vocabulary (padded). G is N / K: query head n reads key head
n // G.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from stackjax.model.config import ModelConfig
from stackjax.model.module import compute_dtype
from stackjax.model.transformer import Params, block_function, embed, final_norm, unembed
from stackjax.sharding import logical


class Cache(NamedTuple):
    """Keys, turned already, and values of a text; slot s belongs to position s."""

    keys_LBSKH: jax.Array
    values_LBSKH: jax.Array


def empty_cache(config: ModelConfig, batch: int, capacity: int) -> Cache:
    """Returns a cache for texts of up to `capacity` tokens, in the compute type."""
    shape = (config.num_layers, batch, capacity, config.num_kv_heads, config.head_dim)
    layout = logical(None, "batch", None, "kv_heads", None)
    dtype = compute_dtype(config)
    return Cache(*(jnp.zeros(shape, dtype, out_sharding=layout) for _ in Cache._fields))


def extend(
    config: ModelConfig,
    params: Params,
    cache: Cache,
    tokens_BT: jax.Array,
    positions_BT: jax.Array,
) -> tuple[jax.Array, Cache]:
    """Returns the residual stream of new tokens after the final norm, and their cache.

    The stream is [B, T, D], of which `next_logits` reads what is asked for. A token sees all
    slots up to its position, so they must be filled, by tokens before or by these. What lies
    in the slots behind it does not matter: rows may be padded at their end, if the padding is
    overwritten before a later token sees it.
    """
    run_block = block_function(config, positions_BT)

    def run_layer(
        carry: tuple[jax.Array, Cache], scanned: tuple[Params, jax.Array]
    ) -> tuple[tuple[jax.Array, Cache], None]:
        (x_BTD, cache), (layer, index) = carry, scanned

        def attend(
            q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array
        ) -> tuple[jax.Array, Cache]:
            new = Cache(k_BTKH, v_BTKH)
            return _on_each_device(q_BTNH, new, cache, positions_BT, index)

        return run_block(x_BTD, layer, attend), None

    layers = params["layers"], np.arange(config.num_layers)
    carry = embed(config, params, tokens_BT), cache
    # The cache is carried, not scanned over, so that it is written in place.
    (x_BTD, cache), _ = jax.lax.scan(run_layer, carry, layers)
    return final_norm(config, params, x_BTD), cache


def next_logits(
    config: ModelConfig, params: Params, x_BTD: jax.Array, place_B: jax.Array
) -> jax.Array:
    """Returns the logits of the token that follows one place of each row, [B, V].

    Args:
      x_BTD: The residual stream, as `extend` returns it.
    """
    x_B1D = jnp.take_along_axis(x_BTD, place_B[:, None, None], axis=1)
    return jnp.squeeze(unembed(config, params, x_B1D), 1)


def _on_each_device(
    q_BTNH: jax.Array, new: Cache, cache: Cache, positions_BT: jax.Array, index: jax.Array
) -> tuple[jax.Array, Cache]:
    """Returns `_attend`, of the rows and heads that each device has."""
    heads, kv_heads = (logical("batch", None, name, None) for name in ("heads", "kv_heads"))
    args = q_BTNH, new, cache, positions_BT, index
    if heads is None:
        return _attend(*args)
    cached = logical(None, "batch", None, "kv_heads", None)
    caches = Cache(cached, cached)
    new_caches = Cache(kv_heads, kv_heads)
    specs = heads, new_caches, caches, logical("batch", None), logical()
    return jax.shard_map(_attend, in_specs=specs, out_specs=(heads, caches))(*args)


def _attend(
    q_BTNH: jax.Array, new: Cache, cache: Cache, positions_BT: jax.Array, index: jax.Array
) -> tuple[jax.Array, Cache]:
    """Returns what queries read of a layer, [B, T, N, H], and the cache with the new in it."""
    rows_B1 = np.arange(len(positions_BT))[:, None]
    cache = Cache(
        *(
            old.at[index, rows_B1, positions_BT].set(added, unique_indices=True)
            for old, added in zip(cache, new, strict=True)
        )
    )
    k_BSKH, v_BSKH = (kept[index] for kept in cache)
    batch, length, num_heads, head_dim = q_BTNH.shape
    num_kv_heads = k_BSKH.shape[2]
    q_BTKGH = (q_BTNH * head_dim**-0.5).reshape(batch, length, num_kv_heads, -1, head_dim)
    scores_BKGTS = jnp.einsum(
        "BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32
    )
    slots = np.arange(k_BSKH.shape[1])[None, None, None, None]
    is_seen_B11TS = slots <= positions_BT[:, None, None, :, None]
    scores_BKGTS = jnp.where(is_seen_B11TS, scores_BKGTS, -jnp.inf)
    weights_BKGTS = jax.nn.softmax(scores_BKGTS, axis=-1).astype(v_BSKH.dtype)
    out_BTKGH = jnp.einsum("BKGTS,BSKH->BTKGH", weights_BKGTS, v_BSKH)
    return out_BTKGH.reshape(q_BTNH.shape), cache
