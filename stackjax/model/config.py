"""Model config: architecture and execution options."""

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from stackjax.model.layer_kind import LayerKind, RopeScaling, check_rotation
from stackjax.model.routing_config import Routing
from stackjax.runtime.constraints import OnlyWith, check_fields
from stackjax.runtime.errors import UserError
from stackjax.runtime.numbers import Epsilon, Positive, Size
from stackjax.runtime.ranges import Real, Whole
from stackjax.sharding.axes import LAYER_AXES, Axes

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
    "experts": "num_experts",
    "routes": "num_experts",
    "expert_mlp": "expert_dim",
    "shared_experts": "num_shared_experts",
    "positions": "max_seq_len",
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
    as in Gemma and OLMo 2, or LayerNorm, biases and an MLP without a gate as in GPT-2 and
    GPT-NeoX.
    """

    vocab_size: Annotated[int, Whole(at_least=1, at_most=2**24)]
    """Vocabulary size before padding."""
    num_layers: Annotated[int, Whole(at_least=0, at_most=MAX_LAYERS)]
    """Number of transformer layers. With 0, the model is embedding, final norm and head."""
    embed_dim: Dim
    """Residual stream width."""
    mlp_dim: Dim
    """Hidden units of each MLP. Without effect if all layers have experts."""
    num_heads: Dim
    """Number of query heads."""
    num_kv_heads: Dim
    """Number of key/value heads, a divisor of `num_heads`. Query head n reads key/value head
    n // (num_heads / num_kv_heads)."""
    head_dim: Dim
    """Channels per head; must be even for rotary positions."""
    loops: Annotated[int, Whole(at_least=1, at_most=MAX_LAYERS)] = 1
    """Times the layers are applied: with 2, layers 0 1 run as 0 1 0 1."""
    num_experts: Annotated[int, Whole(at_least=0, at_most=MAX_DIM)] = 0
    """Experts in each layer (arXiv:1701.06538): SwiGLUs, of which each token has some. With 0,
    all layers are dense."""
    expert_dim: Annotated[int, Whole(at_least=0, at_most=MAX_DIM), OnlyWith("num_experts")] = 0
    """Hidden units of each expert."""
    num_shared_experts: Annotated[
        int, Whole(at_least=0, at_most=MAX_DIM), OnlyWith("num_experts")
    ] = 0
    """Experts that every token has besides (arXiv:2401.06066)."""
    routing: Routing | None = None
    """How tokens choose experts; required with experts. A dense model keeps the routing for
    experts from `upcycle`."""
    pattern: tuple[LayerKind, ...] = ()
    """The repeated layer kinds: layer l has kind l mod its length. The last period
    may be cut. Empty for global attention in all layers."""
    positions: Literal["rotary", "learned"] = "rotary"
    """Rotary positions, or a learned vector for each position, added to the embedding."""
    max_seq_len: Size | None = None
    """Number of learned positions, in tokens; None for rotary positions."""
    rope_theta: Annotated[float, Real(at_least=1)] = 1e4
    """Rotary frequency base."""
    rope_scaling: RopeScaling | None = None
    """Rotary frequency scaling for long contexts."""
    norm: Literal["rms", "layer"] = "rms"
    """RMSNorm, or LayerNorm with a bias."""
    norm_epsilon: Epsilon = 1e-5
    """Epsilon inside the norm, added to the mean square or the variance."""
    tie_head: bool = False
    """Whether the output head shares the embedding's weights."""
    qkv_bias: bool = False
    """Whether queries, keys and values have biases, as in Qwen2."""
    out_bias: bool = False
    """Whether attention's output projection has a bias."""
    mlp_bias: bool = False
    """Whether the MLP's projections have biases."""
    qk_norm: bool = False
    """Whether to normalize queries and keys before the rotation."""
    qk_norm_over: Literal["head", "all_heads"] = "head"
    """Channels in one `qk_norm`: each head alone, or all heads, as in OLMo 2."""
    norm_placement: NormPlacement = "before"
    """A branch's norm: at its input, at its output (OLMo 2), or both (Gemma 2)."""
    parallel_residual: bool = False
    """Whether the MLP reads the same stream as attention, as in GPT-NeoX."""
    unit_offset: bool = False
    """Whether norm gains are stored minus 1, as in Gemma."""
    gated: bool = True
    """Whether the MLP has a gate, which multiplies its units."""
    activation: Activation = "silu"
    """Activation of the MLP's gate: `silu` is SwiGLU, the others are GeGLU; without a gate, of
    its units."""
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

    def has_experts(self, kind: LayerKind) -> bool:
        """Returns whether layers of a kind have experts."""
        return self.num_experts > 0 and not kind.dense

    def is_along(self, axis: str, kind: LayerKind) -> bool:
        """Returns whether layers of a kind are along an axis from `LAYER_AXES`."""
        return axis == "layers" or self.has_experts(kind) == (axis == "expert_layers")

    @property
    def is_mixed(self) -> bool:
        """Whether some layers have experts, and others have not."""
        return len({self.has_experts(kind) for kind in self.kinds}) > 1

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
        self._check_positions()
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
        check_rotation(self.rope_theta, self.rope_scaling, "model")
        if self.qk_norm_over != "head" and not self.qk_norm:
            raise UserError(
                f"model.qk_norm_over is {self.qk_norm_over!r}, which has no effect while "
                f"model.qk_norm is False; leave it out, or set model.qk_norm to True."
            )
        if self.qk_norm and self.norm == "layer":
            raise UserError(
                "model.qk_norm is True, and there is no LayerNorm of queries and keys; set "
                "model.norm to 'rms', or leave out model.qk_norm."
            )
        self._check_experts()
        self._check_completep()
        if self.attention_cap is not None and self.attention == "cudnn":
            raise UserError(
                f"model.attention_cap is {self.attention_cap}, and cuDNN's attention has no "
                f"cap; set model.attention to 'auto'."
            )

    def _check_experts(self) -> None:
        """Raises UserError for experts that do not fit together."""
        kinds = self.period_kinds
        if not self.num_experts:
            if any(kind.dense for kind in kinds):
                raise UserError(
                    "model.pattern has a dense kind, which has no effect while "
                    "model.num_experts is 0; leave it out, or set model.num_experts."
                )
            return
        if all(kind.dense for kind in kinds):
            raise UserError(
                f"model.num_experts is {self.num_experts}, which has no effect while all kinds "
                f"in model.pattern are dense; leave out either."
            )
        for name in ("gated", "mlp_bias"):
            if getattr(self, name) != (name == "gated"):
                raise UserError(
                    f"model.{name} is {getattr(self, name)}, and experts are gated and have no "
                    f"biases; leave it out, or set model.num_experts to 0."
                )
        for name, unset in (("expert_dim", 0), ("routing", None)):
            if getattr(self, name) == unset:
                raise UserError(
                    f"model.{name} is {unset}, and model.num_experts is {self.num_experts}; "
                    f"set both."
                )
        assert self.routing is not None
        if self.routing.top_k > self.num_experts:
            raise UserError(
                f"model.routing.top_k is {self.routing.top_k}; it may be model.num_experts, "
                f"{self.num_experts}, at most."
            )

    def _check_positions(self) -> None:
        """Raises UserError for fields of the other kind of positions."""
        if (self.positions == "learned") != (self.max_seq_len is not None):
            raise UserError(
                f"model.max_seq_len is {self.max_seq_len} and model.positions "
                f"{self.positions!r}; learned positions need their number, and rotary "
                f"positions have none."
            )
        names = ("rope_theta", "rope_scaling", "rotary_share")
        plain = {f.name: f.default for f in dataclasses.fields(self) if f.name in names}
        changed = [name for name in names if getattr(self, name) != plain[name]]
        if any(kind.angles != LayerKind().angles for kind in self.pattern):
            changed.append("pattern")
        if self.positions == "learned" and changed:
            raise UserError(
                f"model.{changed[0]} is {getattr(self, changed[0])}, which has no effect while "
                f"model.positions is 'learned'; leave it out."
            )

    def _check_completep(self) -> None:
        """Raises UserError for a field that CompleteP has no rule for."""
        others = {
            "num_experts": 0,
            "norm_placement": "before",
            "unit_offset": False,
            "qk_norm_over": "head",
            "scale_embedding": False,
            "query_scale": None,
            "positions": "rotary",
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
        field.name: (_architecture(config, field.name), _architecture(other, field.name))
        for field in dataclasses.fields(config)
        if field.name not in ignored
    }
    return ", ".join(f"model.{n} is {a}, not {b}" for n, (a, b) in pairs.items() if a != b)


def _architecture(config: ModelConfig, name: str) -> Any:
    """Returns a field without what only training reads."""
    value = getattr(config, name)
    return value.architecture if isinstance(value, Routing) else value


def untied(config: ModelConfig) -> ModelConfig:
    """Returns the config with a layer of its own for each loop."""
    pattern = config.pattern
    if pattern and config.num_layers % len(pattern):
        pattern = config.kinds  # each loop begins with the first kind
    return dataclasses.replace(config, num_layers=config.depth, loops=1, pattern=pattern)


def axis_size(config: ModelConfig, axis: str) -> int:
    """Returns the length of a logical axis."""
    if axis in LAYER_AXES:
        return len(layers_along(config, axis))
    return 2 if axis == "gate_up" else getattr(config, SIZES[axis])


def shape_of(config: ModelConfig, axes: Axes) -> tuple[int, ...]:
    """Returns a parameter's shape."""
    return tuple(axis_size(config, axis) for axis in axes.names)


def layers_along(config: ModelConfig, axis: str | None) -> tuple[int, ...]:
    """Returns the layers along a stacked axis from `LAYER_AXES`, in order; none for None.

    A parameter of all layers is stacked along `layers`, another one along `expert_layers` or
    `dense_layers`.
    """
    kinds = enumerate(config.kinds)
    return tuple(i for i, kind in kinds if axis and config.is_along(axis, kind))


def check_length(config: ModelConfig, length: int, what: str) -> None:
    """Raises UserError for a text with more tokens than learned positions.

    Args:
      what: The text's name, for the message.
    """
    if config.max_seq_len is not None and length > config.max_seq_len:
        raise UserError(
            f"{what} has {length} tokens, and the model has {config.max_seq_len} learned "
            f"positions (model.max_seq_len); take a shorter one."
        )
