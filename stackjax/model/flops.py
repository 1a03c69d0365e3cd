"""Model cost: number of parameters, FLOPs per token, and MFU.

D embed, N heads, K kv heads, H head_dim, F mlp, V vocab, L layers, T sequence length.
"""

import collections
from collections.abc import Sequence

import jax

from stackjax.model.config import ModelConfig

# Dense bfloat16 FLOP/s per JAX device, by `device_kind`. NVIDIA datasheets give the sparse
# figure, twice as much. Google datasheets count chips; a TPU v3 or TPU7x chip is two devices.
_PEAK_FLOPS = {
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA H100 80GB HBM3": 989.4e12,  # SXM
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835.5e12,
    "NVIDIA H200": 989.4e12,
    "NVIDIA GH200 480GB": 989.4e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA GB200": 2500e12,
    "TPU v3": 123e12 / 2,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU7x": 2307e12 / 2,
}


def num_params(config: ModelConfig) -> int:
    """Returns the number of parameters, without vocabulary padding.

    Embedding, untied head and norms are included.
    """
    tables = 1 if config.tie_head else 2
    return (
        tables * config.vocab_size * config.embed_dim
        + num_layer_params(config)
        + config.embed_dim
    )


def num_layer_params(config: ModelConfig) -> int:
    """Returns the number of parameters in all layers; the growth factor g multiplies it."""
    return config.num_layers * _layer_params(config)


def flops_6nd(config: ModelConfig, trained: Sequence[bool] | None = None) -> int:
    """Returns the training FLOPs per token as 6 N, where N counts all parameters.

    N includes embedding and untied head, and attention scores are not counted. This is the
    convention of arXiv:2405.15319, so curves are comparable with the paper. With loops, N
    counts the layers once for each loop.

    Args:
      trained: Whether each layer trains; None for all. The embedding and frozen layers below
        the first trained layer cost 2 FLOPs per parameter (forward pass only), frozen layers
        above cost 4.
    """
    passes = _passes(config, trained)
    frozen = 0
    if trained is not None and not config.tie_head:
        frozen = 4 * config.vocab_size * config.embed_dim
    frozen += sum(2 * (3 - count) for count in passes) * _layer_params(config)
    looped = (config.loops - 1) * num_layer_params(config)
    return 6 * (num_params(config) + looped) - frozen


def matmul_flops(
    config: ModelConfig, seq_len: int, trained: Sequence[bool] | None = None
) -> int:
    """Returns the exact training FLOPs per token in matrix products.

    The forward pass per token has, with L the depth,

      L (2 D H (2 N + 2 K) + 6 D F + 4 T N H) + 2 D V

    FLOPs for projections, SwiGLU, attention and head; in a layer with a window, T in 4 T N H is
    at most the window. The backward pass has two products for each forward product, so the
    total is three times as much. Attention counts as a full product of queries and keys,
    without the saving from the causal mask. The embedding lookup, rematerialization and
    vocabulary padding do not count.

    Args:
      seq_len: Tokens in each sequence (T).
      trained: Whether each layer trains; None for all. Frozen layers below the first trained
        layer count once (forward pass only). Frozen layers above count twice, except for
        attention scores, with a full backward pass.
    """
    seen = [min(seq_len, kind.window or seq_len) for kind in config.kinds] * config.loops
    head = 2 * config.embed_dim * config.vocab_size
    passes = _passes(config, trained)
    of_attention = [3 if count > 1 else 1 for count in passes]
    attention = sum(
        4 * keys * config.num_heads * config.head_dim * count
        for keys, count in zip(seen, of_attention, strict=True)
    )
    return 2 * _layer_weights(config) * sum(passes) + attention + 3 * head


def peak_flops(device: jax.Device) -> float | None:
    """Returns a device's dense bfloat16 peak in FLOP/s; None if unknown."""
    return _PEAK_FLOPS.get(device.device_kind)


def mfu(flops_per_second: float, devices: Sequence[jax.Device]) -> float | None:
    """Returns the model FLOPs utilization (arXiv:2204.02311), from 0 to 1.

    None if the peak of any device is unknown.

    Args:
      flops_per_second: Total for all devices, as counted by `matmul_flops`.
    """
    peaks = [peak_flops(device) for device in devices]
    known = [peak for peak in peaks if peak is not None]
    return flops_per_second / sum(known) if len(known) == len(peaks) else None


def _passes(config: ModelConfig, trained: Sequence[bool] | None) -> list[int]:
    """Returns the number of products per weight in each layer that a token passes.

    Trained layers have 3, frozen layers 2, frozen layers below the first trained layer 1.
    """
    if trained is None:
        return [3] * config.depth
    trained = [*trained] * config.loops
    first = trained.index(True)
    return [3 if learns else 2 - (i < first) for i, learns in enumerate(trained)]


def _layer_params(config: ModelConfig) -> int:
    norms = (4 if config.norm_placement == "both" else 2) * config.embed_dim
    if config.qk_norm:
        normed_heads = 2
        if config.qk_norm_over == "all_heads":
            normed_heads = config.num_heads + config.num_kv_heads
        norms += normed_heads * config.head_dim
    biased_heads = config.num_heads + 2 * config.num_kv_heads if config.qkv_bias else 0
    return _layer_weights(config) + norms + biased_heads * config.head_dim


def _layer_weights(config: ModelConfig) -> int:
    """Returns the matrix entries in a layer: attention and SwiGLU."""
    heads = 2 * config.num_heads + 2 * config.num_kv_heads
    return config.embed_dim * (heads * config.head_dim + 3 * config.mlp_dim)


def describe(model: ModelConfig) -> str:
    """Returns a text with the model's sizes: layers, channels, heads, and MLP units."""
    loops = f"({model.loops} times) " if model.loops > 1 else ""
    base = model.completep
    completep = f", CompleteP {base.base_layers} x {base.base_embed_dim}" if base else ""
    counts = collections.Counter(str(kind) for kind in model.kinds if model.pattern)
    kinds = "".join(f", {count} {kind}" for kind, count in counts.items())
    return (
        f"{model.num_layers} layers {loops}x {model.embed_dim} channels, {model.num_heads}/"
        f"{model.num_kv_heads} heads, {model.mlp_dim} units{completep}{kinds}"
    )
