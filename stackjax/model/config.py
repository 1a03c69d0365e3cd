"""The architecture of a decoder and how its layers are executed."""

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Literal

from stackjax.runtime.constraints import check_fields
from stackjax.runtime.errors import UserError
from stackjax.runtime.numbers import Epsilon, Positive
from stackjax.runtime.ranges import Real, Whole

AttentionKernel = Literal["xla", "cudnn", "splash"]
RematPolicy = Literal["none", "dots", "full"]

MAX_LAYERS = 10_000
MAX_DIM = 2**22
Dim = Annotated[int, Whole(at_least=1, at_most=MAX_DIM)]
"""The length of an axis."""

SIZES = {
    "layers": "num_layers",
    "embed": "embed_dim",
    "mlp": "mlp_dim",
    "heads": "num_heads",
    "kv_heads": "num_kv_heads",
    "head_dim": "head_dim",
    "vocab": "padded_vocab_size",
}
"""The field of `ModelConfig` that holds the length of each logical axis."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Slower rotation for contexts longer than a model was first trained on.

    That of Llama 3.1 (arXiv:2407.21783): channels that turn less than `low_freq_factor` times
    over the first context turn `factor` times as slowly, those that turn more than
    `high_freq_factor` times as before, and those between in proportion.
    """

    factor: Annotated[float, Real(at_least=1)] = 8.0
    """How many times as slowly the slowest channels turn."""
    low_freq_factor: Positive = 1.0
    """Turns over the first context, below which channels turn `factor` times as slowly."""
    high_freq_factor: Positive = 4.0
    """Turns over the first context, from which channels turn as before."""
    original_seq_len: Annotated[int, Whole(at_least=1, at_most=2**31 - 1)] = 8192
    """Tokens of the first context."""

    def __post_init__(self):
        check_fields(self, "model.rope_scaling")
        if self.low_freq_factor >= self.high_freq_factor:
            raise UserError(
                f"model.rope_scaling.high_freq_factor is {self.high_freq_factor}; it must be "
                f"more than model.rope_scaling.low_freq_factor, {self.low_freq_factor}."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A LLaMA-style decoder: RMSNorm, rotary positions, grouped-query attention, SwiGLU."""

    vocab_size: Annotated[int, Whole(at_least=1, at_most=2**24)]
    """Number of tokens in the vocabulary, before padding."""
    num_layers: Annotated[int, Whole(at_least=1, at_most=MAX_LAYERS)]
    """Transformer blocks."""
    embed_dim: Dim
    """Channels of the residual stream."""
    mlp_dim: Dim
    """Hidden units of each SwiGLU."""
    num_heads: Dim
    """Query heads."""
    num_kv_heads: Dim
    """Key and value heads; must divide `num_heads`. Query head n reads key head n // group."""
    head_dim: Dim
    """Channels of each head; even, because rotary positions turn pairs of channels."""
    rope_theta: Annotated[float, Real(at_least=1)] = 1e4
    """Base of the rotary frequencies."""
    rope_scaling: RopeScaling | None = None
    """How rotation slows down for long contexts, if it does."""
    norm_epsilon: Epsilon = 1e-5
    """Added to the mean square inside RMSNorm."""
    tie_head: bool = False
    """Whether the embedding is also the output head."""
    qkv_bias: bool = False
    """Whether queries, keys and values have biases, as in Qwen2."""
    qk_norm: bool = False
    """Whether queries and keys are normalised per head before the rotation."""
    init: Literal["reference", "scaled"] = "reference"
    """Initial values: the released code of arXiv:2405.15319, or GPT-2's scaled residuals."""
    vocab_multiple: Dim = 128
    """The vocabulary is padded to a multiple of this, so that it divides over any mesh."""
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of activations and matrix products; `auto` is float32 on a CPU, else bfloat16."""
    remat: RematPolicy = "none"
    """What a block recomputes in the backward pass: nothing, all but matrix products, all."""
    attention: Literal["auto"] | AttentionKernel = "auto"
    """Attention by cuDNN (NVIDIA GPUs, in bfloat16), by splash attention (TPUs), or by XLA
    (everywhere); `auto` is the first of these that the device has."""
    scan_unroll: Annotated[int, Whole(at_least=0, at_most=MAX_LAYERS)] = 0
    """Layers per iteration of the scan over layers; 0 is all of them on a CPU without remat,
    where that is faster, and 1 elsewhere."""
    loss_chunk: Annotated[int, Whole(at_least=1, at_most=2**24)] = 512
    """Positions of each sequence whose logits are held at a time."""

    @property
    def padded_vocab_size(self) -> int:
        """The vocabulary size that the embedding and the head are stored with."""
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple

    def __post_init__(self):
        check_fields(self, "model")
        if self.num_heads % self.num_kv_heads:
            raise UserError(
                f"model.num_heads is {self.num_heads}, which model.num_kv_heads "
                f"{self.num_kv_heads} does not divide; choose a divisor of {self.num_heads}."
            )
        if self.head_dim % 2:
            raise UserError(
                f"model.head_dim is {self.head_dim}; rotary positions turn pairs of "
                f"channels, so it must be even."
            )


EXECUTION = ("init", "compute_dtype", "remat", "attention", "scan_unroll", "loss_chunk")
"""Fields of a model that say how it starts or computes, and not what."""


def differences(config: ModelConfig, other: ModelConfig, *, besides: Sequence[str] = ()) -> str:
    """Returns how two models compute different things, in words; empty if they do not.

    Args:
      besides: Fields that may differ.
    """
    names = (field.name for field in dataclasses.fields(config))
    pairs = {
        name: (getattr(config, name), getattr(other, name))
        for name in names
        if name not in (*EXECUTION, *besides)
    }
    return ", ".join(f"model.{n} is {a}, not {b}" for n, (a, b) in pairs.items() if a != b)


def axis_size(config: ModelConfig, axis: str) -> int:
    """Returns the length of a logical axis."""
    return 2 if axis == "gate_up" else getattr(config, SIZES[axis])
