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
ROPE_RULES = {
    "rope_type": Rule((str,), supported=("default", "linear", "llama3")),
    "rope_theta": _POSITIVE,
}
LINEAR_RULES = {
    "factor": _POSITIVE,
    "partial_rotary_factor": Rule((int, float), or_null=True, supported=(None, 1)),
}
LLAMA3_RULES = {
    "factor": _POSITIVE,
    "low_freq_factor": _POSITIVE,
    "high_freq_factor": _POSITIVE,
    "original_max_position_embeddings": _SIZE,
    "partial_rotary_factor": Rule((int, float), or_null=True, supported=(None, 1)),
}


ACTIVATIONS: Mapping[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
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
_BEFORE = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
_AFTER = {
    "attention_out_norm": "post_attention_layernorm",
    "mlp_out_norm": "post_feedforward_layernorm",
}
_BOTH = _AFTER | {
    "attention_norm": "input_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
}
_SWITCHES = ("qkv_bias", "qk_norm", "qk_norm_over", "norm_placement", "unit_offset")
_SWITCHES += ("scale_embedding", "rotary_share")
_PLAIN = {
    field.name: field.default
    for field in dataclasses.fields(ModelConfig)
    if field.name in _SWITCHES
}
"""`ModelConfig` fields that a family determines, with Llama's values."""


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
    period_field: str | None = None
    """Field for another `period`, if there is one."""
    rope_theta: float = 1e4
    """Default `rope_theta`."""
    local_rope_theta: float | None = None
    """Default `rope_theta` in layers that slide; None for the same rotation in all layers."""
    switches: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """`ModelConfig` fields with other values than for Llama."""
    numbers: Mapping[str, tuple[str, float | None]] = dataclasses.field(default_factory=dict)
    """For each `ModelConfig` field, the name and the default in config.json."""
    tensors: Mapping[str, str] = dataclasses.field(default_factory=lambda: _BEFORE)
    """Norm names in a layer, by parameter."""
    rules: Mapping[str, Rule] = dataclasses.field(default_factory=dict)

    @property
    def fixed(self) -> dict[str, Any]:
        """The `ModelConfig` fields that the family determines."""
        numbers = {name: None for name in ("attention_cap", "logit_cap", "query_scale")}
        unset = {name: value for name, value in numbers.items() if name not in self.numbers}
        return _PLAIN | unset | dict(self.switches)

    def holds(self, config: ModelConfig) -> bool:
        """Returns whether the family has a model's architecture."""
        kinds = set(config.kinds)
        windows = {kind.window for kind in kinds} - {None}
        rotations = {kind.angles for kind in kinds}
        limits = {
            "cache": not windows,
            "always": len({kind.window for kind in kinds}) == 1,
            "switched": len(windows) <= 1,
            "listed": len(windows) <= 1,
        }
        turns = {(True, None, None)} if self.local_rope_theta is None else rotations
        return (
            all(getattr(config, name) == value for name, value in self.fixed.items())
            and limits[self.window]
            and rotations <= turns
            and all(kind.rotary for kind in kinds)
        )


FAMILIES = {
    "llama": Family(
        "LlamaForCausalLM",
        seq_len=2048,
        heads_divide=True,
        rules={
            "attention_bias": _NO,
            "mlp_bias": _NO,
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
        rules={"head_dim": _SIZE, "attention_bias": _NO, **_WINDOWS},
    ),
    "olmo2": Family(
        "Olmo2ForCausalLM",
        seq_len=2048,
        norm_epsilon=1e-5,
        switches={"qk_norm": True, "qk_norm_over": "all_heads", "norm_placement": "after"},
        tensors=_AFTER,
        rules={"attention_bias": _NO},
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


def family_of(config: ModelConfig) -> str | None:
    """Returns the first `model_type` with a model's architecture, if any."""
    return next((name for name, family in FAMILIES.items() if family.holds(config)), None)


def norm_names(config: ModelConfig) -> Mapping[str, str]:
    """Returns the norm names in a layer's tensors, by parameter."""
    named = {"before": _BEFORE, "after": _AFTER, "both": _BOTH}
    name = family_of(config)
    return named[config.norm_placement] if name is None else FAMILIES[name].tensors
