"""Model families readable from config.json, with rules for their fields."""

import dataclasses
import sys
from collections.abc import Mapping
from typing import Any, Literal

from stackjax.interop.rule import Rule
from stackjax.model.config import Activation, ModelConfig

_SIZE = Rule((int,), 1, 2**31 - 1)
_SIZE_OR_NULL = dataclasses.replace(_SIZE, or_null=True)
_POSITIVE = Rule((int, float), sys.float_info.min)
_NUMBER = Rule((int, float))
_FLAG = Rule((bool,))
_NO = Rule((bool,), supported=(False,))
_ABSENT = Rule(supported=(None, {}, []))
_OBJECT_OR_NULL = Rule((dict,), or_null=True)
_TYPE = Rule(
    (str,), or_null=True, supported=(None, "float64", "float32", "bfloat16", "float16")
)
_ID_OR_NULL = Rule((int,), or_null=True)

SIZES = {
    "vocab_size": "vocab_size",
    "num_layers": "num_hidden_layers",
    "embed_dim": "hidden_size",
    "mlp_dim": "intermediate_size",
    "num_heads": "num_attention_heads",
}
"""Maps each size in `ModelConfig` to the field in config.json."""

RULES = dict.fromkeys(SIZES.values(), _SIZE) | {
    "num_key_value_heads": _SIZE_OR_NULL,
    "head_dim": _SIZE_OR_NULL,
    "max_position_embeddings": _SIZE,
    "rms_norm_eps": Rule((float,), 0),
    "tie_word_embeddings": _FLAG,
    "sliding_window": Rule((int,), or_null=True),
    "layer_types": Rule((list,), or_null=True),
    "rope_parameters": _OBJECT_OR_NULL,
    "rope_scaling": _OBJECT_OR_NULL,
    "dtype": _TYPE,
    "torch_dtype": _TYPE,
    "is_causal": Rule((bool,), supported=(True,)),
    # Read by transformers in every config.json.
    "quantization_config": Rule(supported=(None,)),
    "per_layer_config": _ABSENT,
    "configuration_files": _ABSENT,
    "transformers_weights": _ABSENT,
    "attribute_map": _ABSENT,
    "attention_chunk_size": Rule(supported=(None, {})),
    "kv_sharing_modes": _ABSENT,
    # Transformers would read this nested config instead.
    **dict.fromkeys(("text_config", "decoder", "generator"), Rule(supported=(None,))),
    # Unused here, but transformers refuses other types.
    "bos_token_id": _ID_OR_NULL,
    "eos_token_id": Rule((int, list), or_null=True),
    "pad_token_id": _ID_OR_NULL,
    "use_cache": _FLAG,
    "initializer_range": Rule((float,)),
    "attention_dropout": Rule((int, float)),
    "id2label": _OBJECT_OR_NULL,
}
"""Rules for the fields common to all families."""
_WINDOWS = {"use_sliding_window": _FLAG, "max_window_layers": Rule((int,))}
ROPE_RULES = {"rope_theta": _POSITIVE}
SHARE_RULE = Rule((int, float), sys.float_info.min, 1)
LINEAR_RULES = {
    "factor": _POSITIVE,
}
YARN_RULES = {
    "factor": dataclasses.replace(_POSITIVE, or_null=True),
    "attention_factor": dataclasses.replace(_POSITIVE, or_null=True),
    **dict.fromkeys(
        ("beta_fast", "beta_slow", "mscale", "mscale_all_dim"),
        Rule((int, float), 0, or_null=True),
    ),
    "truncate": _FLAG,
    "original_max_position_embeddings": _SIZE,
}
LLAMA3_RULES = {
    "factor": _POSITIVE,
    "low_freq_factor": _POSITIVE,
    "high_freq_factor": _POSITIVE,
    "original_max_position_embeddings": _SIZE,
}


ACTIVATIONS: Mapping[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
}
"""Maps each activation in config.json to `ModelConfig.activation`."""
_GEMMA_RULES = {
    "attention_bias": _NO,
    "use_bidirectional_attention": Rule((bool,), or_null=True, supported=(None, False)),
    "attention_dropout": Rule((int, float), or_null=True),
    "num_key_value_heads": _SIZE,
    "head_dim": _SIZE,
    "query_pre_attn_scalar": _SIZE,
    "attn_logit_softcapping": dataclasses.replace(_POSITIVE, or_null=True),
    "final_logit_softcapping": dataclasses.replace(_POSITIVE, or_null=True),
}
_TENSORS = {
    "embedding": ("model.embed_tokens.weight",),
    "final_norm": ("model.norm.weight",),
    "head": ("lm_head.weight",),
    "attention_norm": ("input_layernorm.weight",),
    "query": ("self_attn.q_proj.weight",),
    "key": ("self_attn.k_proj.weight",),
    "value": ("self_attn.v_proj.weight",),
    "query_bias": ("self_attn.q_proj.bias",),
    "key_bias": ("self_attn.k_proj.bias",),
    "value_bias": ("self_attn.v_proj.bias",),
    "query_norm": ("self_attn.q_norm.weight",),
    "key_norm": ("self_attn.k_norm.weight",),
    "out": ("self_attn.o_proj.weight",),
    "out_bias": ("self_attn.o_proj.bias",),
    "attention_out_norm": (),
    "mlp_norm": ("post_attention_layernorm.weight",),
    "gate_up": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    "gate_up_bias": ("mlp.gate_proj.bias", "mlp.up_proj.bias"),
    "down": ("mlp.down_proj.weight",),
    "down_bias": ("mlp.down_proj.bias",),
    "mlp_out_norm": (),
}
"""Llama's tensors for each parameter, without the layer number, in a layer's order."""
_NEOX = {
    "embedding": ("gpt_neox.embed_in.weight",),
    "final_norm": ("gpt_neox.final_layer_norm.weight",),
    "final_norm_bias": ("gpt_neox.final_layer_norm.bias",),
    "head": ("embed_out.weight",),
    "attention_norm_bias": ("input_layernorm.bias",),
    **dict.fromkeys(("query", "key", "value"), ("attention.query_key_value.weight",)),
    **dict.fromkeys(
        ("query_bias", "key_bias", "value_bias"), ("attention.query_key_value.bias",)
    ),
    "out": ("attention.dense.weight",),
    "out_bias": ("attention.dense.bias",),
    "mlp_norm_bias": ("post_attention_layernorm.bias",),
    "up": ("mlp.dense_h_to_4h.weight",),
    "up_bias": ("mlp.dense_h_to_4h.bias",),
    "down": ("mlp.dense_4h_to_h.weight",),
    "down_bias": ("mlp.dense_4h_to_h.bias",),
}
_GPT2 = {
    "embedding": ("transformer.wte.weight",),
    "position_embedding": ("transformer.wpe.weight",),
    "final_norm": ("transformer.ln_f.weight",),
    "final_norm_bias": ("transformer.ln_f.bias",),
    "attention_norm": ("ln_1.weight",),
    "attention_norm_bias": ("ln_1.bias",),
    **dict.fromkeys(("query", "key", "value"), ("attn.c_attn.weight",)),
    **dict.fromkeys(("query_bias", "key_bias", "value_bias"), ("attn.c_attn.bias",)),
    "out": ("attn.c_proj.weight",),
    "out_bias": ("attn.c_proj.bias",),
    "mlp_norm": ("ln_2.weight",),
    "mlp_norm_bias": ("ln_2.bias",),
    "up": ("mlp.c_fc.weight",),
    "up_bias": ("mlp.c_fc.bias",),
    "down": ("mlp.c_proj.weight",),
    "down_bias": ("mlp.c_proj.bias",),
}
_AFTER = {
    "attention_out_norm": ("post_attention_layernorm.weight",),
    "mlp_out_norm": ("post_feedforward_layernorm.weight",),
}
_BOTH = _AFTER | {"mlp_norm": ("pre_feedforward_layernorm.weight",)}
_SWITCHES = ("qkv_bias", "qk_norm", "qk_norm_over", "norm_placement", "unit_offset")
_SWITCHES += ("scale_embedding", "rotary_share", "norm", "gated", "parallel_residual")
_SWITCHES += ("out_bias", "mlp_bias", "positions")
_PLAIN = {
    field.name: field.default
    for field in dataclasses.fields(ModelConfig)
    if field.name in _SWITCHES
}
"""`ModelConfig` fields that a family determines, with Llama's values."""


_ATTENTION_BIAS = {"attention_bias": (False, ("qkv_bias", "out_bias"))}
_MLP_BIAS = {"mlp_bias": (False, ("mlp_bias",))}


@dataclasses.dataclass(frozen=True)
class Family:
    """Defaults, additional field rules and tensor names for a model family."""

    architecture: str
    seq_len: int
    """Default `max_position_embeddings`."""
    num_kv_heads: int | None = None
    """Default `num_key_value_heads`; None means `num_attention_heads`."""
    head_dim: int | None = None
    """Default `head_dim`; None means `hidden_size // num_attention_heads`."""
    norm_epsilon: float = 1e-6
    """Default `rms_norm_eps`."""
    tie_head: bool = False
    """Default `tie_word_embeddings`."""
    heads_divide: bool = False
    """Whether `num_attention_heads` must divide `hidden_size`."""
    activation_field: str = "hidden_act"
    activation: str = "silu"
    """Default value in the `activation_field`."""
    sliding_window: int | None = None
    """Default `sliding_window`, in tokens."""
    window: Literal["cache", "switched", "always", "listed"] = "cache"
    """Effect of `sliding_window`: `cache` limits only the KV cache, `switched` the layers
    selected by other fields, `always` every layer, `listed` the layers in `layer_types`."""
    period: int = 1
    """Without `layer_types`, the last layer in a period is global, the others slide."""
    no_rope_interval: int | None = None
    """Default `no_rope_layer_interval`: one of so many layers has no rotary positions. None for
    rotary positions in all layers."""
    rope_types: tuple[str, ...] = ("default", "linear", "llama3", "yarn")
    """Supported `rope_type`s."""
    period_field: str | None = None
    """Field for another `period`, if there is one."""
    rope_theta: float = 1e4
    """Default `rope_theta`."""
    theta_field: str = "rope_theta"
    """Field with `rope_theta`, besides `rope_parameters`."""
    rotary_share: tuple[str, float] | None = None
    """Name and default of the field with the share of rotary channels, besides
    `rope_parameters`; None if all channels are rotary."""
    local_rope_theta: float | None = None
    """Default `rope_theta` in layers that slide; None for the same rotation in all layers."""
    names: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Llama's name of each field with another name in config.json."""
    aliases: tuple[str, ...] = ()
    """Names of Llama that transformers reads, too."""
    mlp_ratio: int | None = None
    """Default `intermediate_size`, in `hidden_size`; None for a required field."""
    has_heads: bool = True
    """Whether config.json has `num_key_value_heads` and `head_dim`."""
    flags: Mapping[str, tuple[bool, tuple[str, ...]]] = dataclasses.field(default_factory=dict)
    """For each field in config.json, the default, and the fields of `ModelConfig` with its
    value."""
    reads_bare_names: bool = False
    """Whether folders may lack the first part of tensor names."""
    ignored: tuple[str, ...] = ()
    """Ends of the names of tensors without effect."""
    switches: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """`ModelConfig` fields with other values than for Llama."""
    numbers: Mapping[str, tuple[str, float | None]] = dataclasses.field(default_factory=dict)
    """For each `ModelConfig` field, the name and the default in config.json."""
    tensors: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    """Tensor names other than Llama's, by parameter. Parameters of a layer with the same tensor
    are concatenated along the outputs."""
    layers: str = "model.layers"
    """Name of the layers, before the layer number."""
    fused_by_head: bool = False
    """Whether a tensor with several parameters has the first head of each, then the second."""
    transposed: bool = False
    """Whether a layer's matrices are stored as [inputs, outputs]."""
    rules: Mapping[str, Rule] = dataclasses.field(default_factory=dict)

    @property
    def unread(self) -> tuple[str, ...]:
        """Fields of Llama that transformers does not read."""
        return () if self.has_heads else ("num_key_value_heads", "head_dim")

    def renamed(self, tensor: str) -> str:
        """Returns this family's name of a tensor, from a name that transformers reads, too."""
        if tensor.startswith(self.tensor("head").partition(".")[0]):
            return tensor
        if tensor == _TENSORS["head"][0]:
            return self.tensor("head")
        prefix = f"{self.layers.partition('.')[0]}."
        is_bare = self.reads_bare_names and not tensor.startswith(prefix)
        return prefix + tensor if is_bare else tensor

    @property
    def tensor_names(self) -> dict[str, tuple[str, ...]]:
        """Tensor names for each parameter, without the layer number, in a layer's order."""
        return _TENSORS | dict(self.tensors)

    def tensor(self, kind: str) -> str:
        """Returns the tensor of a parameter outside the layers."""
        return self.tensor_names[kind][0]

    @property
    def fixed(self) -> dict[str, Any]:
        """The `ModelConfig` fields that the family determines."""
        numbers = {name: None for name in ("attention_cap", "logit_cap", "query_scale")}
        unset = {name: value for name, value in numbers.items() if name not in self.numbers}
        fixed = _PLAIN | unset | dict(self.switches)
        free = {ours for _, names in self.flags.values() for ours in names}
        free |= set() if self.rotary_share is None else {"rotary_share"}
        return {name: value for name, value in fixed.items() if name not in free}

    def holds(self, config: ModelConfig) -> bool:
        """Returns whether the family has a model's architecture."""
        kinds = set(config.kinds)
        windows = {kind.window for kind in kinds} - {None}
        rotations = {kind.angles for kind in kinds if kind.rotary}
        limits = {
            "cache": not windows,
            "always": len({kind.window for kind in kinds}) == 1,
            "switched": len(windows) <= 1,
            "listed": len(windows) <= 1,
        }
        turns = {(True, None, None)} if self.local_rope_theta is None else rotations
        return (
            all(getattr(config, name) == value for name, value in self.fixed.items())
            and all(
                len({getattr(config, name) for name in names}) == 1
                for _, names in self.flags.values()
            )
            and (self.has_heads or _is_plain(config))
            and limits[self.window]
            and rotations <= turns
            and (self.no_rope_interval is not None or all(kind.rotary for kind in kinds))
        )


FAMILIES = {
    "llama": Family(
        "LlamaForCausalLM",
        seq_len=2048,
        heads_divide=True,
        flags=_ATTENTION_BIAS | _MLP_BIAS,
        rules={
            "attention_dropout": Rule((int, float), or_null=True),
            "pretraining_tp": _ID_OR_NULL,
        },
    ),
    "mistral": Family(
        "MistralForCausalLM",
        seq_len=131072,
        num_kv_heads=8,
        sliding_window=4096,
        window="always",
        rules={"num_key_value_heads": _SIZE},
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        seq_len=32768,
        num_kv_heads=32,
        sliding_window=4096,
        window="switched",
        switches={"qkv_bias": True},
        rules={"head_dim": _SIZE, **_WINDOWS},
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        seq_len=32768,
        num_kv_heads=32,
        head_dim=128,
        sliding_window=4096,
        window="switched",
        switches={"qk_norm": True},
        flags=_ATTENTION_BIAS,
        rules={"head_dim": _SIZE, **_WINDOWS},
    ),
    "phi3": Family(
        "Phi3ForCausalLM",
        seq_len=4096,
        norm_epsilon=1e-5,
        window="always",
        rope_types=("default",),
        rotary_share=("partial_rotary_factor", 1.0),
        tensors={
            **dict.fromkeys(("query", "key", "value"), ("self_attn.qkv_proj.weight",)),
            "gate_up": ("mlp.gate_up_proj.weight",),
        },
        rules={
            "original_max_position_embeddings": Rule((int,)),
            **dict.fromkeys(("resid_pdrop", "embd_pdrop"), _NUMBER),
        },
    ),
    "smollm3": Family(
        "SmolLM3ForCausalLM",
        seq_len=32768,
        num_kv_heads=4,
        tie_head=True,
        window="listed",
        no_rope_interval=4,
        rope_theta=2e6,
        flags=_ATTENTION_BIAS | _MLP_BIAS,
        rules={
            "use_sliding_window": _FLAG,
            "no_rope_layers": Rule((list,), or_null=True),
            "no_rope_layer_interval": _SIZE,
        },
    ),
    "olmo2": Family(
        "Olmo2ForCausalLM",
        seq_len=2048,
        norm_epsilon=1e-5,
        switches={"qk_norm": True, "qk_norm_over": "all_heads", "norm_placement": "after"},
        tensors=_AFTER,
        flags=_ATTENTION_BIAS,
    ),
    "gpt_neox": Family(
        "GPTNeoXForCausalLM",
        seq_len=2048,
        norm_epsilon=1e-5,
        heads_divide=True,
        has_heads=False,
        names={"layer_norm_eps": "rms_norm_eps"},
        activation="gelu",
        theta_field="rotary_emb_base",
        rotary_share=("rotary_pct", 0.25),
        switches={"norm": "layer", "gated": False, "mlp_bias": True},
        flags={
            "attention_bias": (True, ("qkv_bias", "out_bias")),
            "use_parallel_residual": (True, ("parallel_residual",)),
        },
        tensors=_NEOX,
        layers="gpt_neox.layers",
        fused_by_head=True,
        ignored=(".attention.bias", ".attention.masked_bias"),
        rules={
            "is_decoder": _FLAG,
            **dict.fromkeys(("hidden_dropout", "classifier_dropout"), _NUMBER),
        },
    ),
    "gpt2": Family(
        "GPT2LMHeadModel",
        seq_len=1024,
        norm_epsilon=1e-5,
        tie_head=True,
        heads_divide=True,
        has_heads=False,
        names={
            "n_embd": "hidden_size",
            "n_positions": "max_position_embeddings",
            "n_head": "num_attention_heads",
            "n_layer": "num_hidden_layers",
            "n_inner": "intermediate_size",
            "layer_norm_epsilon": "rms_norm_eps",
            "activation_function": "hidden_act",
        },
        aliases=(
            "hidden_size",
            "max_position_embeddings",
            "num_attention_heads",
            "num_hidden_layers",
        ),
        mlp_ratio=4,
        activation="gelu_new",
        switches={
            "norm": "layer",
            "gated": False,
            "qkv_bias": True,
            "out_bias": True,
            "mlp_bias": True,
            "positions": "learned",
        },
        tensors=_GPT2,
        layers="transformer.h",
        transposed=True,
        reads_bare_names=True,
        ignored=(".attn.bias", ".attn.masked_bias"),
        rules={
            "intermediate_size": _SIZE_OR_NULL,
            **dict.fromkeys(("rope_parameters", "rope_scaling"), Rule(supported=(None, {}))),
            "attribute_map": Rule(supported=()),
            "scale_attn_weights": Rule((bool,), supported=(True,)),
            "scale_attn_by_inverse_layer_idx": _NO,
            "reorder_and_upcast_attn": _FLAG,
            "add_cross_attention": _NO,
            **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), _NUMBER),
            "summary_first_dropout": _NUMBER,
            "summary_type": Rule((str,)),
            "summary_activation": Rule((str,), or_null=True),
            **dict.fromkeys(("summary_use_proj", "summary_proj_to_labels"), _FLAG),
        },
    ),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        seq_len=8192,
        num_kv_heads=4,
        head_dim=256,
        tie_head=True,
        heads_divide=True,
        activation_field="hidden_activation",
        activation="gelu_pytorch_tanh",
        sliding_window=4096,
        window="listed",
        period=2,
        switches={"norm_placement": "both", "unit_offset": True, "scale_embedding": True},
        numbers={
            "query_scale": ("query_pre_attn_scalar", 256),
            "attention_cap": ("attn_logit_softcapping", 50.0),
            "logit_cap": ("final_logit_softcapping", 30.0),
        },
        tensors=_BOTH,
        rules=_GEMMA_RULES,
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        seq_len=131072,
        num_kv_heads=4,
        head_dim=256,
        tie_head=True,
        heads_divide=True,
        activation_field="hidden_activation",
        activation="gelu_pytorch_tanh",
        sliding_window=4096,
        window="listed",
        period=6,
        rope_types=("default", "linear", "llama3"),
        period_field="sliding_window_pattern",
        rope_theta=1e6,
        local_rope_theta=1e4,
        switches={
            "qk_norm": True,
            "norm_placement": "both",
            "unit_offset": True,
            "scale_embedding": True,
        },
        numbers={
            "query_scale": ("query_pre_attn_scalar", 256),
            "logit_cap": ("final_logit_softcapping", None),
        },
        tensors=_BOTH,
        # Transformers makes a mask with a window in any case.
        rules={"sliding_window_pattern": _SIZE, "sliding_window": _SIZE, **_GEMMA_RULES},
    ),
}


def _is_plain(config: ModelConfig) -> bool:
    """Returns whether every query head has its own key, and the heads share the channels."""
    heads = config.num_heads
    return config.num_kv_heads == heads and config.head_dim * heads == config.embed_dim


def family_of(config: ModelConfig) -> str | None:
    """Returns the first `model_type` with a model's architecture, if any."""
    return next((name for name, family in FAMILIES.items() if family.holds(config)), None)
