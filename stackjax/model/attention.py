"""Causal self-attention with rotary positions, using the fastest available kernel.

Shapes: B batch, T query time, S key time, N query heads, K key/value heads, H head_dim. G is
N / K: query head n reads key head n // G.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.extend.core import Primitive

from stackjax.model.block_attention import block_attention
from stackjax.model.config import AttentionKernel, ModelConfig, RopeScaling
from stackjax.sharding.partition import logical
from stackjax.sharding.platform import DeviceKind, is_nvidia, platform_of, target_device

Kernel = Callable[[jax.Array, jax.Array, jax.Array, jax.Array | None], jax.Array]

_RESIDUALS = "flash_residuals"
"""Checkpoint name of splash attention's output and logsumexp."""
_SPLASH_BLOCK = 512
_LANES = 128
"""Splash attention needs a multiple of this sequence length."""


def _is_cudnn_forward(primitive: Primitive, *_: Any, **__: Any) -> bool:
    return primitive.name.startswith("dot_product_attention_fwd")


save_flash_residuals = jax.checkpoint_policies.save_from_both_policies(
    # The cuDNN call has no checkpoint name.
    jax.checkpoint_policies.save_only_these_names(_RESIDUALS),
    _is_cudnn_forward,
)
"""Remat policy: saves flash attention's output and logsumexp.

The backward pass then does not run the forward kernel again. Other attention is recomputed.
"""


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


def has_kernel(kernel: AttentionKernel, device: DeviceKind) -> bool:
    """Returns whether a device kind supports a kernel."""
    return {
        "xla": True,
        "cudnn": is_nvidia(device),
        "splash": platform_of(device) == "tpu",
    }[kernel]


def choose_kernel(config: ModelConfig, dtype: jnp.dtype, seq_len: int) -> AttentionKernel:
    """Returns the configured kernel; for "auto", the fastest for this dtype and length."""
    if config.attention != "auto":
        return config.attention
    device = target_device()
    # On all GPUs since Ampere, cuDNN supports bfloat16, at most 128 channels per head, and
    # masks with an even length.
    narrow = dtype == jnp.bfloat16 and config.head_dim % 8 == 0 and config.head_dim <= 128
    if narrow and seq_len % 2 == 0 and has_kernel("cudnn", device):
        return "cudnn"
    if seq_len % _LANES == 0 and has_kernel("splash", device):
        return "splash"
    return "xla"


def causal_attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    segments_BT: jax.Array | None,
    kernel: AttentionKernel,
) -> jax.Array:
    """Returns causal attention within each segment, [B, T, N, H], with a float32 softmax.

    Args:
      segments_BT: None if each row is a single segment.
      kernel: As from `choose_kernel`.
    """
    if kernel == "xla":
        return _xla(q_BTNH, k_BSKH, v_BSKH, segments_BT)
    one_device = {"cudnn": _cudnn, "splash": _splash}[kernel]
    return _on_each_device(one_device)(q_BTNH, k_BSKH, v_BSKH, segments_BT)


def _on_each_device(kernel: Kernel) -> Kernel:
    """Returns a kernel that runs on each device's rows and heads."""
    heads, kv_heads = (logical("batch", "seq", name, None) for name in ("heads", "kv_heads"))
    if heads is None:
        return kernel
    specs = (heads, kv_heads, kv_heads, logical("batch", "seq"))
    # Pallas results have no varying-axes type, so skip this check.
    return jax.shard_map(kernel, in_specs=specs, out_specs=heads, check_vma=False)


def _xla(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, segments_BT: jax.Array | None
) -> jax.Array:
    batch, seq_len, num_heads, head_dim = q_BTNH.shape
    num_kv_heads = k_BSKH.shape[2]
    grouped = (batch, seq_len, num_kv_heads, num_heads // num_kv_heads, head_dim)
    # In JAX 0.11, reshape loses the sharding along axes with length 1.
    layout = logical("batch", "seq", "kv_heads", None, None)
    q_BTKGH = jnp.reshape(q_BTNH * head_dim**-0.5, grouped, out_sharding=layout)
    q_BKHGT = q_BTKGH.transpose(0, 2, 4, 3, 1)
    k_BKSH, v_BKSH = k_BSKH.transpose(0, 2, 1, 3), v_BSKH.transpose(0, 2, 1, 3)
    out_BKHGT = block_attention(q_BKHGT, k_BKSH, v_BKSH, segments_BT)
    layout = logical("batch", "seq", "heads", None)
    return jnp.reshape(out_BKHGT.transpose(0, 4, 1, 3, 2), q_BTNH.shape, out_sharding=layout)


def _cudnn(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, segments_BT: jax.Array | None
) -> jax.Array:
    mask = None
    if segments_BT is not None:
        mask = (segments_BT[:, :, None] == segments_BT[:, None, :])[:, None]
    return jax.nn.dot_product_attention(
        q_BTNH, k_BSKH, v_BSKH, mask=mask, is_causal=True, implementation="cudnn"
    )


def _splash(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, segments_BT: jax.Array | None
) -> jax.Array:
    _, seq_len, num_heads, head_dim = q_BTNH.shape
    size = math.gcd(_SPLASH_BLOCK, seq_len)
    attend = splash.make_splash_mha_single_device(
        masks.MultiHeadMask([masks.CausalMask((seq_len, seq_len))] * num_heads),
        block_sizes=splash.BlockSizes(
            block_q=size,
            block_kv=size,
            block_kv_compute=size,
            block_q_dkv=size,
            block_kv_dkv=size,
            block_kv_dkv_compute=size,
            block_q_dq=size,
            block_kv_dq=size,
        ),
        residual_checkpoint_name=_RESIDUALS,
    )
    segments = None if segments_BT is None else splash.SegmentIds(segments_BT, segments_BT)
    q_BNTH, k_BKSH, v_BKSH = (x.transpose(0, 2, 1, 3) for x in (q_BTNH, k_BSKH, v_BSKH))
    # Splash attention does not scale the logits.
    q_BNTH *= head_dim**-0.5
    out_BNTH: Any = jax.vmap(attend)(q_BNTH, k_BKSH, v_BKSH, segments)
    return out_BNTH.transpose(0, 2, 1, 3)
