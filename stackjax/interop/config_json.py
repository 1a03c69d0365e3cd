"""Conversion between config.json (Llama, Mistral, Qwen2, Qwen3) and `ModelConfig`."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stackjax.files.paths import file_inside
from stackjax.interop.families import FAMILIES, LLAMA3_RULES, ROPE_RULES, RULES, SIZES, Family
from stackjax.interop.rule import check_fields, shown
from stackjax.model import ModelConfig
from stackjax.model.config import RopeScaling, differences
from stackjax.runtime.errors import UserError

CONFIG = "config.json"
_MAX_JSON_BYTES = 10**8


def read_json(file: Path) -> Any:
    """Returns a parsed JSON file.

    Raises:
      UserError: The file is too large, nested too deeply, or not JSON.
    """
    size = file.stat().st_size
    if size > _MAX_JSON_BYTES:
        raise UserError(
            f"{file} has {size:,} bytes; the limit is {_MAX_JSON_BYTES:,}: download it again."
        )
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise UserError(f"{file} is nested too deeply; download it again.") from error
    except ValueError as error:
        raise UserError(f"{file} is not JSON ({error}); download it again.") from error


def read_fields(path: Path) -> Mapping[str, Any]:
    """Returns a folder's config.json.

    Raises:
      UserError: The file is missing, damaged, or has no `model_type`.
    """
    file = Path(file_inside(path, CONFIG, str(path)))
    if not file.is_file():
        raise UserError(f"{path} has no {CONFIG}; name a Hugging Face folder.")
    fields = read_json(file)
    if not isinstance(fields, dict) or "model_type" not in fields:
        raise UserError(f"{file} has no model_type; name a Hugging Face folder.")
    return fields


def model_config(fields: Mapping[str, Any], name: str = CONFIG) -> ModelConfig:
    """Returns the `ModelConfig` for a config.json, with the defaults from transformers.

    Args:
      name: File name for messages.

    Raises:
      UserError: A field is missing, malformed or unsupported.
    """
    family = _family(fields, name)
    missing = [field for field in SIZES.values() if field not in fields]
    if missing:
        raise UserError(f"{name} lacks {', '.join(missing)}; download it again.")
    check_fields(fields, {**RULES, **family.rules}, name)
    sizes = {ours: fields[theirs] for ours, theirs in SIZES.items()}
    _check_layer_types(fields, name)
    _check_windows(fields, family, name)
    _check_heads(fields, name)
    _check_padding(fields, name)
    rope = _rope(fields, family, name)
    head_dim = fields.get("head_dim", family.head_dim)
    num_kv_heads = fields.get("num_key_value_heads", family.num_kv_heads)
    try:
        return ModelConfig(
            **sizes,
            head_dim=head_dim or sizes["embed_dim"] // sizes["num_heads"],
            num_kv_heads=num_kv_heads or sizes["num_heads"],
            rope_theta=float(rope["rope_theta"]),
            rope_scaling=_rope_scaling(rope),
            norm_epsilon=fields.get("rms_norm_eps", 1e-6),
            tie_head=fields.get("tie_word_embeddings", False),
            qkv_bias=family.qkv_bias,
            qk_norm=family.qk_norm,
        )
    except UserError as error:
        raise UserError(f"{name}: {error}") from error


def _family(fields: Mapping[str, Any], name: str) -> Family:
    kind = fields["model_type"]
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise UserError(
            f"{name}: model_type is {shown(kind)}; it must be {', '.join(FAMILIES)}."
        )
    return FAMILIES[kind]


def _check_heads(fields: Mapping[str, Any], name: str) -> None:
    """Raises UserError if a Llama's number of heads does not divide `hidden_size`."""
    channels, heads = fields["hidden_size"], fields["num_attention_heads"]
    if fields["model_type"] == "llama" and channels % heads:
        raise UserError(
            f"{name}: num_attention_heads is {heads}; it must divide hidden_size {channels}."
        )


def _check_padding(fields: Mapping[str, Any], name: str) -> None:
    """Raises UserError if the padding token is not in the vocabulary."""
    padding, size = fields.get("pad_token_id"), fields["vocab_size"]
    if padding is not None and not -size <= padding < size:
        raise UserError(
            f"{name}: pad_token_id is {padding}; it must be below vocab_size {size}, or null."
        )


def _check_layer_types(fields: Mapping[str, Any], name: str) -> None:
    """Raises UserError unless `layer_types` has a supported type for each layer."""
    kinds, num_layers = fields.get("layer_types"), fields["num_hidden_layers"]
    if kinds is None:
        return
    if len(kinds) != num_layers:
        raise UserError(
            f"{name}: layer_types has {len(kinds)} entries; num_hidden_layers is {num_layers}."
        )
    known = ("full_attention", "attention", "sliding_attention")
    for kind in kinds:
        if kind not in known:
            raise UserError(
                f"{name}: layer_types has {shown(kind)}, which stackjax cannot represent."
            )


def _check_windows(fields: Mapping[str, Any], family: Family, name: str) -> None:
    """Raises UserError if a sliding window is shorter than the longest context."""
    window = _window(fields, family)
    if not _slides(fields, family):
        return
    if window is None:
        raise UserError(
            f"{name}: layer_types has 'sliding_attention', but sliding_window is null."
        )
    if window < seq_len(fields):
        raise UserError(
            f"{name} has a sliding_window of {window}, which stackjax cannot represent."
        )


def _window(fields: Mapping[str, Any], family: Family) -> int | None:
    """Returns the sliding window in tokens; None if transformers uses none."""
    if family.window == "switched" and not fields.get("use_sliding_window", False):
        return None
    return fields.get("sliding_window", family.sliding_window)


def _slides(fields: Mapping[str, Any], family: Family) -> bool:
    """Returns whether the sliding window affects attention or the KV cache in any layer."""
    window, kinds = _window(fields, family), fields.get("layer_types")
    if kinds is not None and "sliding_attention" in kinds:
        return True
    if window is None:
        return False
    if family.window == "always":
        return True
    first = fields.get("max_window_layers", 28) if family.window == "switched" else 0
    return kinds is None and first < fields["num_hidden_layers"]


def _rope(fields: Mapping[str, Any], family: Family, name: str) -> Mapping[str, Any]:
    """Returns the RoPE parameters, with the defaults from transformers.

    `rope_scaling` (before version 5) has priority over `rope_parameters`.
    """
    source = "rope_scaling" if fields.get("rope_scaling") else "rope_parameters"
    rope = dict(fields.get(source) or {})
    nested = [key for key, value in rope.items() if isinstance(value, dict)]
    if nested:
        raise UserError(
            f"{name} has {source} for {shown(nested[0])} only, which stackjax cannot represent."
        )
    rope.setdefault("rope_type", rope.get("type", "default"))
    rope.setdefault("rope_theta", fields.get("rope_theta", 1e4))
    rules = ROPE_RULES
    if rope["rope_type"] == "llama3":
        rules = ROPE_RULES | LLAMA3_RULES
        rope.setdefault("partial_rotary_factor", fields.get("partial_rotary_factor"))
        original = "original_max_position_embeddings"
        # Transformers prefers the top-level field.
        rope[original] = fields.get(original, rope.get(original, seq_len(fields)))
        missing = [field for field in rules if field not in rope]
        if missing:
            raise UserError(f"{name} lacks {', '.join(missing)} in {source}.")
    check_fields(rope, rules, f"{source} in {name}")
    return rope


def _rope_scaling(rope: Mapping[str, Any]) -> RopeScaling | None:
    if rope["rope_type"] == "default":
        return None
    return RopeScaling(
        factor=rope["factor"],
        low_freq_factor=rope["low_freq_factor"],
        high_freq_factor=rope["high_freq_factor"],
        original_seq_len=rope["original_max_position_embeddings"],
    )


def seq_len(fields: Mapping[str, Any]) -> int:
    """Returns the longest context for a config.json, in tokens."""
    default = FAMILIES[fields["model_type"]].seq_len
    return fields.get("max_position_embeddings", default)


def config_fields(
    config: ModelConfig, dtype: str | None, template: Mapping[str, Any] | None, seq_len: int
) -> dict[str, Any]:
    """Returns the config.json for a model.

    Args:
      dtype: Type of the weights, such as `bfloat16`; None keeps the template's type.
      template: Original config.json with all other fields, or None.
      seq_len: Longest training sequence, in tokens.

    Raises:
      UserError: No supported family has this architecture, or the model has no layers.
    """
    if not config.num_layers:
        raise UserError(
            "model.num_layers is 0, and a folder holds a model with layers; grow it first."
        )
    fields = dict(template) if template else _new_fields(config, seq_len)
    _check_family(config, fields["model_type"])
    fields |= {theirs: getattr(config, ours) for ours, theirs in SIZES.items()}
    fields["num_key_value_heads"] = config.num_kv_heads
    head_dim = FAMILIES[fields["model_type"]].head_dim or config.embed_dim / config.num_heads
    if "head_dim" in fields or config.head_dim != head_dim:
        fields["head_dim"] = config.head_dim
    fields["rms_norm_eps"] = float(config.norm_epsilon)
    fields["tie_word_embeddings"] = config.tie_head
    if dtype is not None:
        fields["dtype" if "dtype" in fields else "torch_dtype"] = dtype
    if fields.get("layer_types"):
        fields["layer_types"] = ["full_attention"] * config.num_layers
    fields = _with_rope(_with_length(fields, seq_len), config)
    _check_same_model(config, fields)
    return fields


def _check_same_model(config: ModelConfig, fields: Mapping[str, Any]) -> None:
    """Raises UserError if a config.json describes another model."""
    if lost := differences(config, model_config(fields), besides=("vocab_multiple",)):
        raise UserError(
            f"config.json of model_type {fields['model_type']} cannot hold this model: {lost}; "
            f"for a new field, extend config_fields and model_config (docs/interop.md)."
        )


def _check_family(config: ModelConfig, kind: str) -> None:
    """Raises UserError if a family cannot represent the model."""
    family = FAMILIES[kind]
    if (config.qkv_bias, config.qk_norm) != (family.qkv_bias, family.qk_norm):
        raise UserError(
            f"model.qkv_bias is {config.qkv_bias} and model.qk_norm {config.qk_norm}, which "
            f"model_type {kind} does not support."
        )
    if kind == "llama" and config.embed_dim % config.num_heads:
        raise UserError(
            f"model.num_heads {config.num_heads} does not divide model.embed_dim "
            f"{config.embed_dim}, as transformers requires for Llama."
        )


def _with_length(fields: Mapping[str, Any], trained: int) -> dict[str, Any]:
    """Returns fields with a context of at least `trained` tokens and no sliding window."""
    family = FAMILIES[fields["model_type"]]
    longer = dict(fields)
    if seq_len(fields) < trained:
        longer["max_position_embeddings"] = trained
    window = _window(longer, family)
    if _slides(longer, family) and (window is None or window < seq_len(longer)):
        longer["sliding_window"] = None
    return longer


def _with_rope(fields: Mapping[str, Any], config: ModelConfig) -> dict[str, Any]:
    """Returns fields with the model's RoPE parameters; unchanged if equivalent already."""
    found = model_config(fields)
    if (found.rope_theta, found.rope_scaling) == (config.rope_theta, config.rope_scaling):
        return dict(fields)
    other = ("rope_parameters", "original_max_position_embeddings", "partial_rotary_factor")
    kept = {name: value for name, value in fields.items() if name not in other}
    return kept | _rope_fields(config)


def _new_fields(config: ModelConfig, seq_len: int) -> dict[str, Any]:
    kind = "qwen3" if config.qk_norm else "qwen2" if config.qkv_bias else "llama"
    return {
        "architectures": [FAMILIES[kind].architecture],
        "model_type": kind,
        "hidden_act": "silu",
        "max_position_embeddings": seq_len,
        "bos_token_id": None,
        "eos_token_id": None,
        **_rope_fields(config),
    }


def _rope_fields(config: ModelConfig) -> dict[str, Any]:
    """Returns RoPE fields in the format before version 5, readable by all versions."""
    scaling = config.rope_scaling
    if scaling is None:
        return {"rope_theta": config.rope_theta, "rope_scaling": None}
    llama3 = {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_seq_len,
    }
    return {"rope_theta": config.rope_theta, "rope_scaling": llama3}
