"""Causal attention over sequences that are sharded along the mesh axis `context`.

If `context` divides the key heads on a device, the arrays are resharded: each device gets whole
sequences for some of the heads (DeepSpeed-Ulysses, arXiv:2309.14509). Otherwise each device
gathers the keys and values of the whole sequence for its own queries.

Shapes: B batch, T query time, S key time, N query heads, K key/value heads, H head_dim.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from stackjax.model.attention_kernels import (
    SPLASH_RESIDUALS,
    Kernel,
    on_each_device,
    run_splash,
    splash_blocks,
    splash_mask,
)
from stackjax.model.config import AttentionKernel
from stackjax.model.masking import Masking
from stackjax.runtime.errors import UserError
from stackjax.sharding.partition import logical, num_shards

_AXIS = "context"


def query_pieces(num_kv_heads: int) -> int:
    """Returns the number of pieces into which attention cuts the queries of a sequence.

    1 means whole sequences; otherwise each device has two pieces.
    """
    shards = num_shards("seq")
    has_whole = shards == 1 or num_kv_heads % num_shards("attention_heads") == 0
    return 1 if has_whole else 2 * shards


def attention_by_heads(
    kernel: Kernel,
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    segments_BT: jax.Array | None,
) -> jax.Array:
    """Returns attention with whole sequences for some of the heads on each device."""
    heads, rows = logical("batch", None, "attention_heads", None), logical("batch", None)
    q_BTNH, k_BSKH, v_BSKH = (jax.reshard(x, heads) for x in (q_BTNH, k_BSKH, v_BSKH))
    if segments_BT is not None:
        segments_BT = jax.reshard(segments_BT, rows)
    # Pallas results have no varying-axes type, so skip this check.
    attend = jax.shard_map(
        kernel, in_specs=(heads, heads, heads, rows), out_specs=heads, check_vma=False
    )
    out_BTNH = attend(q_BTNH, k_BSKH, v_BSKH, segments_BT)
    return jax.reshard(out_BTNH, logical("batch", "seq", "heads", None))


def attention_by_queries(
    kernel: AttentionKernel,
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    segments_BT: jax.Array | None,
    masking: Masking,
) -> jax.Array:
    """Returns attention with some of the queries and all keys on each device.

    Raises:
      UserError: The logits have a cap, and the kernel takes none.
    """
    if kernel != "splash":
        if masking.cap is not None:
            raise UserError(
                f"model.attention_cap is {masking.cap}, which needs whole sequences or splash "
                f"attention under mesh.context; choose a mesh.context that divides "
                f"model.num_kv_heads on each device."
            )
        return on_each_device(_masked(kernel, masking))(q_BTNH, k_BSKH, v_BSKH, segments_BT)
    attend, attend_layout = _zigzag_splash(q_BTNH.shape[1], q_BTNH.shape[2], masking)
    heads, kv_heads = (logical("batch", "seq", name, None) for name in ("heads", "kv_heads"))
    specs = attend_layout, heads, kv_heads, kv_heads, logical("batch", "seq")
    run = jax.shard_map(_splash, in_specs=specs, out_specs=heads, check_vma=False)
    return run(attend, q_BTNH, k_BSKH, v_BSKH, segments_BT)


def _masked(kernel: Literal["xla", "cudnn"], masking: Masking) -> Kernel:
    """Returns attention of a device's queries over all keys, with an explicit mask."""

    def attend(
        q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, segments_BT: jax.Array | None
    ) -> jax.Array:
        k_BSKH, v_BSKH = _gathered(k_BSKH), _gathered(v_BSKH)
        length = q_BTNH.shape[1]
        query_T = jax.lax.axis_index(_AXIS) * length + jnp.arange(length)
        key_1S = jnp.arange(k_BSKH.shape[1])[None, :]
        mask_BTS = masking.is_seen(query_T[:, None], key_1S)[None]
        if segments_BT is not None:
            segments_BS = _gathered(segments_BT)
            mask_BTS &= segments_BT[:, :, None] == segments_BS[:, None, :]
        return jax.nn.dot_product_attention(
            q_BTNH, k_BSKH, v_BSKH, mask=mask_BTS[:, None], implementation=kernel
        )

    return attend


def _splash(
    attend: Any,
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    segments_BT: jax.Array | None,
) -> jax.Array:
    """Returns splash attention of a device's queries over all keys.

    Args:
      attend: The kernel as from `_zigzag_splash`.
    """
    segments = None
    if segments_BT is not None:
        segments = splash.SegmentIds(_to_zigzag(segments_BT), _gathered(segments_BT))
    k_BSKH, v_BSKH = _gathered(k_BSKH), _gathered(v_BSKH)
    return _from_zigzag(run_splash(attend, _to_zigzag(q_BTNH), k_BSKH, v_BSKH, segments))


def _gathered(x: jax.Array) -> jax.Array:
    return jax.lax.all_gather(x, _AXIS, axis=1, tiled=True)


# In zigzag order, a sequence on C devices has 2C chunks. Device i has chunks i and 2C - 1 - i,
# so under the causal mask all devices attend to equally many keys. Otherwise, device i has
# chunks 2i and 2i + 1.


def zigzag_order(seq_len: int, num_devices: int) -> np.ndarray:
    """Returns the positions in zigzag order, device by device.

    >>> zigzag_order(8, num_devices=2)
    array([0, 1, 6, 7, 2, 3, 4, 5])
    """
    chunks = np.arange(seq_len).reshape(2 * num_devices, -1)
    order = [(i, 2 * num_devices - 1 - i) for i in range(num_devices)]
    return chunks[np.ravel(order)].ravel()


def _to_zigzag(x: jax.Array) -> jax.Array:
    """Returns a device's queries [B, T, ...] in zigzag order."""
    first, second = (
        jax.lax.ppermute(half, _AXIS, moves)
        for half, moves in zip(jnp.split(x, 2, axis=1), _moves(), strict=True)
    )
    return jnp.concatenate(_swapped_if_odd(first, second), axis=1)


def _from_zigzag(x: jax.Array) -> jax.Array:
    """Returns a device's outputs [B, T, ...] in the order of the sequence."""
    halves = _swapped_if_odd(*jnp.split(x, 2, axis=1))
    back = (
        jax.lax.ppermute(half, _AXIS, [(target, source) for source, target in moves])
        for half, moves in zip(halves, _moves(), strict=True)
    )
    return jnp.concatenate(list(back), axis=1)


def _moves() -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Returns the moves to zigzag order, (source, target), of the even and the odd chunks."""
    num_devices = jax.lax.axis_size(_AXIS)

    def device(chunk: int) -> int:
        return min(chunk, 2 * num_devices - 1 - chunk)

    even, odd = ([(i, device(2 * i + half)) for i in range(num_devices)] for half in (0, 1))
    return even, odd


def _swapped_if_odd(first: jax.Array, second: jax.Array) -> list[jax.Array]:
    """Returns two chunks, swapped on odd devices: there, the odd chunk is the earlier one."""
    is_odd = jax.lax.axis_index(_AXIS) % 2 == 1
    return [jnp.where(is_odd, second, first), jnp.where(is_odd, first, second)]


def _zigzag_splash(seq_len: int, num_heads: int, masking: Masking) -> tuple[Any, Any]:
    """Returns splash attention for queries in zigzag order, and the layout of its arrays."""
    num_devices = num_shards("seq")
    mask = splash_mask(seq_len, masking, num_devices)
    mask.q_sequence = zigzag_order(seq_len, num_devices).astype(np.int32)
    attend = splash.make_splash_mha(
        masks.MultiHeadMask([mask] * (num_heads // num_shards("heads"))),
        head_shards=1,
        q_seq_shards=num_devices,
        block_sizes=splash_blocks(seq_len // (2 * num_devices)),
        attn_logits_soft_cap=masking.cap,
        residual_checkpoint_name=SPLASH_RESIDUALS,
    )
    mesh = jax.sharding.get_abstract_mesh()
    layout = attend.manual_sharding_spec(NamedSharding(mesh, P(None, _AXIS)))
    return jax.tree.map(jax.reshard, attend, layout), layout
