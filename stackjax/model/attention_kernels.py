"""Causal attention kernels for the rows and heads on one device.

Shapes: B batch, T query time, S key time, N query heads, K key/value heads, H head_dim. Query
head n reads key head n // (N / K).
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.extend.core import Primitive

from stackjax.model.config import AttentionKernel
from stackjax.model.masking import Masking
from stackjax.sharding.partition import logical
from stackjax.sharding.platform import DeviceKind, is_nvidia, platform_of

Kernel = Callable[[jax.Array, jax.Array, jax.Array, jax.Array | None], jax.Array]
"""Attention function: (q_BTNH, k_BSKH, v_BSKH, segments_BT) -> output [B, T, N, H]."""

SPLASH_LANES = 128
"""Splash attention needs a multiple of this sequence length."""
SPLASH_RESIDUALS = "flash_residuals"
"""Checkpoint name of splash attention's output and logsumexp."""
_SPLASH_BLOCK = 512
_MASK_BLOCK = 4096
_KEY_MULTIPLE = 128  # cuDNN's masks have an even length


def _is_cudnn_forward(primitive: Primitive, *_: Any, **__: Any) -> bool:
    return primitive.name.startswith("dot_product_attention_fwd")


save_flash_residuals = jax.checkpoint_policies.save_from_both_policies(
    # The cuDNN call has no checkpoint name.
    jax.checkpoint_policies.save_only_these_names(SPLASH_RESIDUALS),
    _is_cudnn_forward,
)
"""Remat policy: saves flash attention's output and logsumexp.

The backward pass then does not run the forward kernel again. Other attention is recomputed.
"""


def has_kernel(kernel: AttentionKernel, device: DeviceKind) -> bool:
    """Returns whether a device kind supports a kernel."""
    return {
        "xla": True,
        "cudnn": is_nvidia(device),
        "splash": platform_of(device) == "tpu",
    }[kernel]


def on_each_device(kernel: Kernel) -> Kernel:
    """Returns a kernel that runs on each device's rows, positions and heads."""
    heads, kv_heads = (logical("batch", "seq", name, None) for name in ("heads", "kv_heads"))
    if heads is None:
        return kernel
    specs = (heads, kv_heads, kv_heads, logical("batch", "seq"))
    # Pallas results have no varying-axes type, so skip this check.
    return jax.shard_map(kernel, in_specs=specs, out_specs=heads, check_vma=False)


def cudnn_attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    segments_BT: jax.Array | None,
    *,
    masking: Masking,
) -> jax.Array:
    """Returns causal attention by cuDNN's flash attention, for bfloat16 and without a cap."""
    assert masking.cap is None, "cuDNN has no logit cap"
    attend = functools.partial(jax.nn.dot_product_attention, implementation="cudnn")
    if segments_BT is None:
        window = None if masking.window is None else (masking.window - 1, 0)
        return attend(q_BTNH, k_BSKH, v_BSKH, is_causal=True, local_window_size=window)
    seq_len, outs = q_BTNH.shape[1], []
    # cuDNN takes documents only as an explicit mask. Blocks of queries keep masks small, and
    # leave out most keys in the future and before the window.
    for start in range(0, seq_len, _MASK_BLOCK):
        stop = min(start + _MASK_BLOCK, seq_len)
        first = masking.first_key(start, multiple=_KEY_MULTIPLE)
        query_T1, key_1S = jnp.arange(start, stop)[:, None], jnp.arange(first, stop)[None, :]
        is_past_TS = masking.is_seen(query_T1, key_1S)
        is_same_BTS = segments_BT[:, start:stop, None] == segments_BT[:, None, first:stop]
        out_BTNH = attend(
            q_BTNH[:, start:stop],
            k_BSKH[:, first:stop],
            v_BSKH[:, first:stop],
            mask=(is_past_TS[None] & is_same_BTS)[:, None],
            is_causal=start == 0,  # faster, and for as many keys as queries alone
        )
        outs.append(out_BTNH)
    return jnp.concatenate(outs, axis=1)


def splash_attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    segments_BT: jax.Array | None,
    *,
    masking: Masking,
) -> jax.Array:
    """Returns causal attention by splash attention, for TPUs."""
    _, seq_len, num_heads, _ = q_BTNH.shape
    attend = splash.make_splash_mha_single_device(
        masks.MultiHeadMask([splash_mask(seq_len, masking)] * num_heads),
        block_sizes=splash_blocks(seq_len),
        attn_logits_soft_cap=masking.cap,
        residual_checkpoint_name=SPLASH_RESIDUALS,
    )
    segments = None if segments_BT is None else splash.SegmentIds(segments_BT, segments_BT)
    return run_splash(attend, q_BTNH, k_BSKH, v_BSKH, segments)


def splash_mask(seq_len: int, masking: Masking, num_shards: int = 1) -> Any:
    """Returns splash attention's mask over a sequence."""
    shape = (seq_len, seq_len)
    if masking.window is None:
        return masks.CausalMask(shape, shard_count=num_shards)
    return masks.LocalMask(
        shape, window_size=(masking.window - 1, 0), offset=0, shard_count=num_shards
    )


def splash_blocks(seq_len: int) -> splash.BlockSizes:
    """Returns splash attention's block sizes for sequences of queries and keys."""
    size = math.gcd(_SPLASH_BLOCK, seq_len)
    return splash.BlockSizes(
        block_q=size,
        block_kv=size,
        block_kv_compute=size,
        block_q_dkv=size,
        block_kv_dkv=size,
        block_kv_dkv_compute=size,
        block_q_dq=size,
        block_kv_dq=size,
    )


def run_splash(
    attend: Any,
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    segments: splash.SegmentIds | None,
) -> jax.Array:
    """Returns the output of a splash attention kernel, [B, T, N, H]."""
    q_BNTH, k_BKSH, v_BKSH = (x.transpose(0, 2, 1, 3) for x in (q_BTNH, k_BSKH, v_BSKH))
    # Splash attention does not scale the logits.
    q_BNTH *= q_BTNH.shape[-1] ** -0.5
    out_BNTH: Any = jax.vmap(attend)(q_BNTH, k_BKSH, v_BKSH, segments)
    return out_BNTH.transpose(0, 2, 1, 3)


FLASH_KERNELS: Mapping[str, Callable[..., jax.Array]] = {
    "cudnn": cudnn_attention,
    "splash": splash_attention,
}
"""The flash attention kernels by name; each also takes a `masking`."""
