"""What a model costs: parameters, FLOPs per token, and the share of a device's peak.

D embed, N heads, K kv heads, H head_dim, F mlp, V vocab, L layers, T sequence length.
"""

from collections.abc import Sequence

import jax

from stackjax.model.config import ModelConfig

# Dense bfloat16 FLOP/s of what JAX calls one device, by `device_kind`. Datasheets of
# NVIDIA give the sparse figure, which is twice this; those of Google give chips, and on
# TPU v3 and TPU7x a chip is two devices.
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
    """Returns the number of parameters, without the rows that pad the vocabulary.

    Embedding, head (none of its own where it is tied) and norms are included.
    """
    tables = 1 if config.tie_head else 2
    return (
        tables * config.vocab_size * config.embed_dim
        + num_layer_params(config)
        + config.embed_dim
    )


def num_layer_params(config: ModelConfig) -> int:
    """Returns the number of parameters in layers: what a growth factor (g) multiplies."""
    return config.num_layers * _layer_params(config)


def flops_6nd(config: ModelConfig, trained: Sequence[bool] | None = None) -> int:
    """Returns the training FLOPs per token as 6 N, with N all parameters.

    This is the convention behind the curves of arXiv:2405.15319 (embedding and untied
    head included, attention scores not), so curves of both can be laid over each other.

    Args:
      trained: Which layers learn, if not all. The embedding and layers below the first cost
        2 per parameter, as they only run forward, and those above it that do not learn 4.
    """
    passes = _passes(config, trained)
    frozen = 0
    if trained is not None and not config.tie_head:
        frozen = 4 * config.vocab_size * config.embed_dim
    frozen += sum(2 * (3 - count) for count in passes) * _layer_params(config)
    return 6 * num_params(config) - frozen


def matmul_flops(
    config: ModelConfig, seq_len: int, trained: Sequence[bool] | None = None
) -> int:
    """Returns the training FLOPs per token of the model's matrix products, exactly.

    Three times those of the forward pass, per token

      L (2 D H (2 N + 2 K) + 6 D F + 4 T N H) + 2 D V

    for projections, SwiGLU, attention and head; the backward pass has two products for
    each one forward. Attention counts as a full T x T product: its causal half is not
    taken off. The embedding is a gather and counts nothing, and neither does what remat
    computes again, nor the padding of the vocabulary.

    Args:
      seq_len: Tokens in each sequence (T).
      trained: Which layers learn, if not all. Those below the first count once, as they
        only run forward. Those above it that do not learn count twice, but for attention,
        which multiplies no weights and so has all of its backward pass.
    """
    attention = 4 * seq_len * config.num_heads * config.head_dim
    head = 2 * config.embed_dim * config.vocab_size
    passes = _passes(config, trained)
    of_attention = [3 if count > 1 else 1 for count in passes]
    return 2 * _layer_weights(config) * sum(passes) + attention * sum(of_attention) + 3 * head


def peak_flops(device: jax.Device) -> float | None:
    """Returns the dense bfloat16 peak of a device in FLOP/s; None if it is unknown."""
    return _PEAK_FLOPS.get(device.device_kind)


def mfu(flops_per_second: float, devices: Sequence[jax.Device]) -> float | None:
    """Returns the model FLOPs utilisation (arXiv:2204.02311), between 0 and 1.

    None where the peak of any device is unknown.

    Args:
      flops_per_second: Of all the devices together, as `matmul_flops` counts them.
    """
    peaks = [peak_flops(device) for device in devices]
    known = [peak for peak in peaks if peak is not None]
    return flops_per_second / sum(known) if len(known) == len(peaks) else None


def _passes(config: ModelConfig, trained: Sequence[bool] | None) -> list[int]:
    """Returns how often weights of each layer are used: 3 learning, 2 frozen, 1 below."""
    if trained is None:
        return [3] * config.num_layers
    first = trained.index(True)
    return [3 if learns else 2 - (i < first) for i, learns in enumerate(trained)]


def _layer_params(config: ModelConfig) -> int:
    norms = 2 * config.embed_dim + (2 * config.head_dim if config.qk_norm else 0)
    biased_heads = config.num_heads + 2 * config.num_kv_heads if config.qkv_bias else 0
    return _layer_weights(config) + norms + biased_heads * config.head_dim


def _layer_weights(config: ModelConfig) -> int:
    """Returns the entries of the matrices of one layer: attention and SwiGLU."""
    heads = 2 * config.num_heads + 2 * config.num_kv_heads
    return config.embed_dim * (heads * config.head_dim + 3 * config.mlp_dim)


def describe(model: ModelConfig) -> str:
    """Returns the sizes of a model that may grow, in words."""
    return (
        f"{model.num_layers} layers x {model.embed_dim} channels, {model.num_heads}/"
        f"{model.num_kv_heads} heads, {model.mlp_dim} units"
    )
