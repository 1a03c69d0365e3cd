"""Model config: architecture and execution options."""

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Literal

from stackjax.model.layer_kind import LayerKind, RopeScaling
from stackjax.runtime.constraints import check_fields
from stackjax.runtime.errors import UserError
from stackjax.runtime.numbers import Epsilon, Positive
from stackjax.runtime.ranges import Real, Whole

AttentionKernel = Literal["xla", "cudnn", "splash"]
Activation = Literal["silu", "gelu", "gelu_tanh"]
NormPlacement = Literal["before", "after", "both"]
RematPolicy = Literal["none", "dots", "lean", "full"]

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
"""The `ModelConfig` field with the length of each logical axis."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompleteP:
    """CompleteP (arXiv:2505.01618): one learning rate for all depths and widths.

    The optimizer's fields hold for a base model with these sizes. For a model with other
    sizes, initial values, residual branches, logits, learning rates, weight decays and
    epsilons have factors, from the ratio of each size to the base size. A model with the base
    sizes is the standard model.
    """

    base_layers: Annotated[int, Whole(at_least=1, at_most=MAX_LAYERS)]
    """The base model's depth."""
    base_embed_dim: Dim
    """The base model's `embed_dim`."""
    base_mlp_dim: Dim
    """The base model's `mlp_dim`."""
    base_heads: Dim
    """The base model's `num_heads`."""
    base_kv_heads: Dim
    """The base model's `num_kv_heads`."""
    base_head_dim: Dim
    """The base model's `head_dim`."""

    @classmethod
    def of(cls, base: "ModelConfig") -> "CompleteP":
        """Returns the base sizes of a model."""
        return cls(
            base_layers=base.depth,
            base_embed_dim=base.embed_dim,
            base_mlp_dim=base.mlp_dim,
            base_heads=base.num_heads,
            base_kv_heads=base.num_kv_heads,
            base_head_dim=base.head_dim,
        )

    def __post_init__(self):
        check_fields(self, "model.completep")
        if self.base_heads % self.base_kv_heads:
            raise UserError(
                f"model.completep.base_heads is {self.base_heads}, which "
                f"model.completep.base_kv_heads {self.base_kv_heads} does not divide; take all "
                f"base sizes from one model."
            )
        if self.base_head_dim % 2:
            raise UserError(
                f"model.completep.base_head_dim is {self.base_head_dim}; it must be even, like "
                f"model.head_dim."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A LLaMA-style decoder: RMSNorm, rotary positions, grouped-query attention, SwiGLU.

    Layers may have several kinds (`pattern`), and the model may have norms, activation and caps
    as in Gemma and OLMo 2.
    """

    vocab_size: Annotated[int, Whole(at_least=1, at_most=2**24)]
    """Vocabulary size before padding."""
    num_layers: Annotated[int, Whole(at_least=0, at_most=MAX_LAYERS)]
    """Number of transformer layers. With 0, the model is embedding, final norm and head."""
    embed_dim: Dim
    """Residual stream width."""
    mlp_dim: Dim
    """Hidden units of each SwiGLU."""
    num_heads: Dim
    """Number of query heads."""
    num_kv_heads: Dim
    """Number of key/value heads, a divisor of `num_heads`. Query head n reads key/value head
    n // (num_heads / num_kv_heads)."""
    head_dim: Dim
    """Channels per head; must be even for rotary positions."""
    loops: Annotated[int, Whole(at_least=1, at_most=MAX_LAYERS)] = 1
    """Times the layers are applied: with 2, layers 0 1 run as 0 1 0 1."""
    pattern: tuple[LayerKind, ...] = ()
    """The repeated layer kinds: layer l has kind l mod its length. The last period
    may be cut. Empty for global attention in all layers."""
    rope_theta: Annotated[float, Real(at_least=1)] = 1e4
    """Rotary frequency base."""
    rope_scaling: RopeScaling | None = None
    """Rotary frequency scaling for long contexts."""
    norm_epsilon: Epsilon = 1e-5
    """Epsilon inside RMSNorm, added to the mean square."""
    tie_head: bool = False
    """Whether the output head shares the embedding's weights."""
    qkv_bias: bool = False
    """Whether queries, keys and values have biases, as in Qwen2."""
    qk_norm: bool = False
    """Whether to normalize queries and keys before the rotation."""
    qk_norm_over: Literal["head", "all_heads"] = "head"
    """Channels in one `qk_norm`: each head alone, or all heads, as in OLMo 2."""
    norm_placement: NormPlacement = "before"
    """A branch's RMSNorm: at its input, at its output (OLMo 2), or both (Gemma 2)."""
    unit_offset: bool = False
    """Whether norm gains are stored minus 1, as in Gemma."""
    activation: Activation = "silu"
    """The MLP's gate: `silu` is SwiGLU, the others are GeGLU."""
    attention_cap: Positive | None = None
    """Bound c for attention logits: c tanh(logits / c)."""
    logit_cap: Positive | None = None
    """Bound c for next-token logits: c tanh(logits / c)."""
    scale_embedding: bool = False
    """Whether embeddings are multiplied by the square root of `embed_dim`."""
    query_scale: Positive | None = None
    """Attention logits are divided by the square root of this number; by default `head_dim`."""
    rotary_share: Annotated[float, Real(more_than=0, at_most=1)] = 1.0
    """Share of each head's channels with rotary positions: the first channels."""
    completep: CompleteP | None = None
    """Base sizes of CompleteP, for learning rates that hold for all depths and widths; None for
    the standard parametrization."""
    init: Literal["reference", "scaled"] = "reference"
    """Initialization: the released code of arXiv:2405.15319, or GPT-2's scaled residuals."""
    vocab_multiple: Dim = 128
    """The vocabulary is padded to a multiple of this number, to be divisible on any mesh."""
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dtype of activations and matrix products; `auto` is float32 on CPU, else bfloat16."""
    remat: RematPolicy = "none"
    """Rematerialization in the backward pass. `none` recomputes nothing. `dots` saves the
    products with weights, and the output of cuDNN or splash attention. `lean` is `dots` without
    the products with `mlp_dim` channels. `full` recomputes everything."""
    attention: Literal["auto"] | AttentionKernel = "auto"
    """Attention kernel: cuDNN (NVIDIA GPUs, bfloat16), splash attention (TPUs), or XLA (all
    devices); `auto` is the fastest supported kernel."""
    scan_unroll: Annotated[int, Whole(at_least=0, at_most=MAX_LAYERS)] = 0
    """Layers per iteration of the scan over layers; 0 means all layers on a CPU without remat,
    otherwise 1."""
    loss_chunk: Annotated[int, Whole(at_least=1, at_most=2**24)] = 512
    """Positions per sequence in each chunk of the loss; limits the memory for logits."""

    @property
    def padded_vocab_size(self) -> int:
        """Vocabulary size of embedding and head, with padding."""
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple

    @property
    def rotary_dim(self) -> int:
        """Channels with rotary positions in a head."""
        return int(self.head_dim * self.rotary_share)

    @property
    def period_kinds(self) -> tuple[LayerKind, ...]:
        """The kinds in a period, at least one."""
        return self.pattern or (LayerKind(),)

    @property
    def kinds(self) -> tuple[LayerKind, ...]:
        """Every layer's kind."""
        period = self.period_kinds
        return tuple(period[i % len(period)] for i in range(self.num_layers))

    @property
    def depth(self) -> int:
        """Number of layers that a token passes: `num_layers` times `loops`."""
        return self.num_layers * self.loops

    @property
    def base(self) -> "ModelConfig":
        """The base model of CompleteP; without CompleteP, this model."""
        if self.completep is None:
            return self
        return dataclasses.replace(
            self,
            num_layers=self.completep.base_layers,
            loops=1,
            embed_dim=self.completep.base_embed_dim,
            mlp_dim=self.completep.base_mlp_dim,
            num_heads=self.completep.base_heads,
            num_kv_heads=self.completep.base_kv_heads,
            head_dim=self.completep.base_head_dim,
            completep=None,
        )

    @property
    def has_factors(self) -> bool:
        """Does CompleteP change the model or training? Not for the base sizes."""
        if self.completep is None:
            return False
        same = dataclasses.replace(untied(self), completep=None, pattern=self.pattern)
        return self.base != same

    def __post_init__(self):
        check_fields(self, "model")
        if self.depth > MAX_LAYERS:
            raise UserError(
                f"model.loops is {self.loops}, so {self.depth} layers would run; num_layers "
                f"times loops may be {MAX_LAYERS}."
            )
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
        if self.rotary_dim % 2 or not self.rotary_dim:
            raise UserError(
                f"model.rotary_share is {self.rotary_share}, {self.rotary_dim} of "
                f"{self.head_dim} channels; rotary positions turn pairs of channels, so it "
                f"must be even."
            )
        if self.qk_norm_over != "head" and not self.qk_norm:
            raise UserError(
                f"model.qk_norm_over is {self.qk_norm_over!r}, which has no effect while "
                f"model.qk_norm is False; leave it out, or set model.qk_norm to True."
            )
        self._check_completep()
        if self.attention_cap is not None and self.attention == "cudnn":
            raise UserError(
                f"model.attention_cap is {self.attention_cap}, and cuDNN's attention has no "
                f"cap; set model.attention to 'auto'."
            )

    def _check_completep(self) -> None:
        """Raises UserError for a field that CompleteP has no rule for."""
        others = {
            "norm_placement": "before",
            "unit_offset": False,
            "qk_norm_over": "head",
            "scale_embedding": False,
            "query_scale": None,
        }
        for name, plain in others.items():
            if self.completep is not None and getattr(self, name) != plain:
                raise UserError(
                    f"model.{name} is {getattr(self, name)!r}, and model.completep has no rule "
                    f"for it; leave out either."
                )


EXECUTION = ("init", "compute_dtype", "remat", "attention", "scan_unroll", "loss_chunk")
"""Fields for initialization and execution; all other fields define the architecture."""


def differences(config: ModelConfig, other: ModelConfig, *, besides: Sequence[str] = ()) -> str:
    """Returns a text with the differences between two architectures; empty if equal.

    Patterns with the same kind in each layer are equal.

    Args:
      besides: Fields to ignore.
    """
    ignored = [*EXECUTION, *besides]
    if config.kinds == other.kinds:
        ignored.append("pattern")
    pairs = {
        field.name: (getattr(config, field.name), getattr(other, field.name))
        for field in dataclasses.fields(config)
        if field.name not in ignored
    }
    return ", ".join(f"model.{n} is {a}, not {b}" for n, (a, b) in pairs.items() if a != b)


def untied(config: ModelConfig) -> ModelConfig:
    """Returns the config with a layer of its own for each loop."""
    pattern = config.pattern
    if pattern and config.num_layers % len(pattern):
        pattern = config.kinds  # each loop begins with the first kind
    return dataclasses.replace(config, num_layers=config.depth, loops=1, pattern=pattern)


def axis_size(config: ModelConfig, axis: str) -> int:
    """Returns the length of a logical axis."""
    return 2 if axis == "gate_up" else getattr(config, SIZES[axis])
