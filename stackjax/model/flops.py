"""Model cost: number of parameters, FLOPs per token, and MFU.

D embed, N heads, K kv heads, H head_dim, F mlp, E experts, V vocab, L layers, T sequence
length.
"""

import collections
from collections.abc import Sequence

import jax

from stackjax.model.config import ModelConfig
from stackjax.model.layer_kind import LayerKind
from stackjax.runtime.numbers import short

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

    Embeddings, untied head, norms, biases, and all experts are included.
    """
    return _outer_params(config) + num_layer_params(config)


def num_active_params(config: ModelConfig) -> int:
    """Returns the number of parameters that a token passes, each loop counted once.

    Of the experts, these are `top_k` and the shared ones; without experts, `num_params`.
    """
    active = sum(_layer_params(config, kind, is_active=True) for kind in config.kinds)
    return _outer_params(config) + active


def num_layer_params(config: ModelConfig) -> int:
    """Returns the number of parameters in all layers; the growth factor g multiplies it."""
    return sum(_layer_params(config, kind) for kind in config.kinds)


def flops_6nd(config: ModelConfig, trained: Sequence[bool] | None = None) -> int:
    """Returns the training FLOPs per token as 6 N, where N counts all active parameters.

    N includes embedding and untied head, and attention scores are not counted. This is the
    convention of arXiv:2405.15319, so curves are comparable with the paper. With loops, N
    counts the layers once for each loop. With experts, N counts `num_active_params`.

    Args:
      trained: Whether each layer trains; None for all. Embeddings and frozen layers below the
        first trained layer cost 2 FLOPs per parameter (forward pass only), frozen layers
        above cost 4.
    """
    passes = _passes(config, trained)
    frozen = 0
    if trained is not None:
        rows = (0 if config.tie_head else config.vocab_size) + (config.max_seq_len or 0)
        frozen = 4 * rows * config.embed_dim
    active = [_layer_params(config, kind, is_active=True) for kind in config.kinds]
    pairs = zip(passes, active * config.loops, strict=True)
    return 6 * _outer_params(config) + sum(2 * count * size for count, size in pairs) - frozen


def matmul_flops(
    config: ModelConfig, seq_len: int, trained: Sequence[bool] | None = None
) -> int:
    """Returns the exact training FLOPs per token in matrix products.

    The forward pass per token has, with L the depth,

      L (2 D H (2 N + 2 K) + 6 D F + 4 T N H) + 2 D V

    FLOPs for projections, SwiGLU, attention and head; an MLP without a gate has 4 D F. In a
    layer with a window, T in 4 T N H is at most the window. In a layer with E experts, F is the
    hidden units of the `top_k` and of the shared experts, and the router adds 2 D E. The
    backward pass has two products for each forward product, so the total is three times as
    much. Attention counts as a full T x T product, without the saving from the causal mask. The
    embedding lookup, rematerialization, vocabulary padding and rows that pad the blocks of
    experts do not count.

    Args:
      seq_len: Tokens in each sequence (T).
      trained: Whether each layer trains; None for all. Frozen layers below the first trained
        layer count once (forward pass only). Frozen layers above count twice, except for
        attention scores, with a full backward pass.
    """
    kinds = config.kinds * config.loops
    head = 2 * config.embed_dim * config.vocab_size
    total = 3 * head
    for kind, count in zip(kinds, _passes(config, trained), strict=True):
        keys = min(seq_len, kind.window or seq_len)
        attention = 4 * keys * config.num_heads * config.head_dim
        total += 2 * _layer_weights(config, kind, is_active=True) * count
        total += attention * (3 if count > 1 else 1)
    return total


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


def _outer_params(config: ModelConfig) -> int:
    """Returns the number of parameters outside of layers."""
    tables = 1 if config.tie_head else 2
    rows = tables * config.vocab_size + (config.max_seq_len or 0) + _norm_vectors(config)
    return rows * config.embed_dim


def _layer_params(config: ModelConfig, kind: LayerKind, *, is_active: bool = False) -> int:
    norms = (4 if config.norm_placement == "both" else 2) * config.embed_dim
    norms *= _norm_vectors(config)
    if config.qk_norm:
        normed_heads = 2
        if config.qk_norm_over == "all_heads":
            normed_heads = config.num_heads + config.num_kv_heads
        norms += normed_heads * config.head_dim
    biased_heads = config.num_heads + 2 * config.num_kv_heads if config.qkv_bias else 0
    biases = biased_heads * config.head_dim + config.out_bias * config.embed_dim
    if config.mlp_bias:
        biases += config.embed_dim + (2 if config.gated else 1) * config.mlp_dim
    if config.has_experts(kind) and config.routing and config.routing.balance == "bias":
        biases += config.num_experts
    return _layer_weights(config, kind, is_active=is_active) + norms + biases


def _norm_vectors(config: ModelConfig) -> int:
    """Returns the number of vectors in a norm: a gain, and LayerNorm's bias."""
    return 2 if config.norm == "layer" else 1


def _layer_weights(config: ModelConfig, kind: LayerKind, *, is_active: bool) -> int:
    """Returns the matrix entries in a layer: attention, and MLP, or router and experts.

    Args:
      is_active: Count only the experts that a token has.
    """
    heads = 2 * config.num_heads + 2 * config.num_kv_heads
    hidden, router = config.mlp_dim, 0
    if config.has_experts(kind):
        assert config.routing is not None
        chosen = config.routing.top_k if is_active else config.num_experts
        hidden = (chosen + config.num_shared_experts) * config.expert_dim
        router = config.num_experts
    of_unit = 3 if config.gated else 2
    return config.embed_dim * (heads * config.head_dim + of_unit * hidden + router)


def describe(model: ModelConfig) -> str:
    """Returns a text with the model's sizes: layers, channels, heads, MLP units or experts."""
    loops = f"({model.loops} times) " if model.loops > 1 else ""
    base = model.completep
    completep = f", CompleteP {base.base_layers} x {base.base_embed_dim}" if base else ""
    counts = collections.Counter(str(kind) for kind in model.kinds if model.pattern)
    switches = {
        "LayerNorm": model.norm == "layer",
        "parallel": model.parallel_residual,
        "no gate": not model.gated,
        f"{model.max_seq_len} learned positions": model.positions == "learned",
    }
    kinds = "".join(f", {name}" for name, is_on in switches.items() if is_on)
    kinds += "".join(f", {count} {kind}" for kind, count in counts.items())
    return (
        f"{model.num_layers} layers {loops}x {model.embed_dim} channels, {model.num_heads}/"
        f"{model.num_kv_heads} heads, {units(model)}{completep}{kinds}"
    )


def active(model: ModelConfig) -> str:
    """Returns the active parameters in words, to follow all; empty for a dense model."""
    count = num_active_params(model)
    return "" if count == num_params(model) else f", {short(count)} of them active"


def units(model: ModelConfig) -> str:
    """Returns the hidden units of MLPs and experts in words."""
    if model.routing is None or not model.num_experts:
        return f"{model.mlp_dim} units"
    chosen = f"top {model.routing.top_k} of {model.num_experts}"
    shared = f" and {model.num_shared_experts} shared" if model.num_shared_experts else ""
    dense = f", {model.mlp_dim} units in dense layers" if model.is_mixed else ""
    return f"{chosen}{shared} experts of {model.expert_dim} units{dense}"
