"""Model families readable from config.json, with rules for their fields."""

import dataclasses
import sys
from collections.abc import Mapping
from typing import Literal

from stackjax.interop.rule import Rule

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
    "hidden_act": Rule((str,), supported=("silu", "swish")),
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
    "attention_chunk_size": _ABSENT,
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
    "rope_type": Rule((str,), supported=("default", "llama3")),
    "rope_theta": _POSITIVE,
}
LLAMA3_RULES = {
    "factor": _POSITIVE,
    "low_freq_factor": _POSITIVE,
    "high_freq_factor": _POSITIVE,
    "original_max_position_embeddings": _SIZE,
    "partial_rotary_factor": Rule((int, float), or_null=True, supported=(None, 1)),
}


@dataclasses.dataclass(frozen=True)
class Family:
    """Defaults and additional field rules for a model family."""

    architecture: str
    seq_len: int
    """Default `max_position_embeddings`."""
    num_kv_heads: int | None = None
    """Default `num_key_value_heads`; None means `num_attention_heads`."""
    head_dim: int | None = None
    """Default `head_dim`; None means `hidden_size // num_attention_heads`."""
    sliding_window: int | None = None
    """Default `sliding_window`, in tokens."""
    window: Literal["cache", "switched", "always"] = "cache"
    """Effect of `sliding_window`: `cache` limits only the KV cache, `switched` the layers
    selected by other fields, `always` every layer."""
    qkv_bias: bool = False
    qk_norm: bool = False
    rules: Mapping[str, Rule] = dataclasses.field(default_factory=dict)


FAMILIES = {
    "llama": Family(
        "LlamaForCausalLM",
        seq_len=2048,
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
        qkv_bias=True,
        rules={"head_dim": _SIZE, **_WINDOWS},
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        seq_len=32768,
        num_kv_heads=32,
        head_dim=128,
        sliding_window=4096,
        window="switched",
        qk_norm=True,
        rules={"head_dim": _SIZE, "attention_bias": _NO, **_WINDOWS},
    ),
}
