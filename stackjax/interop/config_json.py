"""The config.json of a Llama, Mistral, Qwen2 or Qwen3 as a `ModelConfig`, and back."""

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from stackjax.errors import UserError
from stackjax.model import ModelConfig
from stackjax.model.config import RopeScaling

CONFIG = "config.json"


@dataclasses.dataclass(frozen=True)
class _Family:
    """What one kind of model does where its config.json says nothing, and can do at all."""

    architecture: str
    num_kv_heads: int | None = None
    """None where there are as many as query heads."""
    head_dim: int | None = None
    """None where heads share the channels of the residual stream."""
    sliding_window: int | None = None
    qkv_bias: bool = False
    qk_norm: bool = False


_FAMILIES = {
    "llama": _Family("LlamaForCausalLM"),
    "mistral": _Family("MistralForCausalLM", num_kv_heads=8, sliding_window=4096),
    "qwen2": _Family("Qwen2ForCausalLM", num_kv_heads=32, qkv_bias=True),
    "qwen3": _Family("Qwen3ForCausalLM", num_kv_heads=32, head_dim=128, qk_norm=True),
}
_FIELDS = {
    "vocab_size": "vocab_size",
    "num_layers": "num_hidden_layers",
    "embed_dim": "hidden_size",
    "mlp_dim": "intermediate_size",
    "num_heads": "num_attention_heads",
}
"""The field of config.json that has each size of a model."""


def read_json(file: Path) -> Any:
    """Returns what a file of a folder says; UserError if it is damaged."""
    try:
        return json.loads(file.read_text())
    except ValueError as error:
        raise UserError(f"{file} is not JSON ({error}); download it again.") from error


def read_fields(path: Path) -> Mapping[str, Any]:
    """Returns the config.json of a folder; UserError if there is none to read."""
    file = path / CONFIG
    if not file.is_file():
        raise UserError(f"{path} has no {CONFIG}; name a folder of transformers.")
    fields = read_json(file)
    if not isinstance(fields, dict) or "model_type" not in fields:
        raise UserError(f"{file} has no model_type; name a folder of transformers.")
    return fields


def model_config(fields: Mapping[str, Any], name: str = CONFIG) -> ModelConfig:
    """Returns the model that a config.json describes.

    Args:
      name: What errors call it.

    Raises:
      UserError: It lacks a size, or has what stackjax cannot represent.
    """
    family = _FAMILIES.get(fields["model_type"])
    if family is None:
        raise UserError(
            f"{name}: model_type {fields['model_type']!r} is none of {', '.join(_FAMILIES)}."
        )
    missing = [field for field in _FIELDS.values() if fields.get(field) is None]
    if missing:
        raise UserError(f"{name} lacks {', '.join(missing)}.")
    for said in _not_representable(fields, family):
        raise UserError(f"{name} has {said}, which stackjax cannot represent.")
    sizes = {ours: fields[theirs] for ours, theirs in _FIELDS.items()}
    head_dim = fields.get("head_dim") or family.head_dim
    if head_dim is None:
        head_dim = sizes["embed_dim"] // sizes["num_heads"]
    num_kv_heads = fields.get("num_key_value_heads") or family.num_kv_heads
    rope = _rope(fields)
    try:
        return ModelConfig(
            **sizes,
            head_dim=head_dim,
            num_kv_heads=num_kv_heads or sizes["num_heads"],
            rope_theta=float(rope.get("rope_theta", fields.get("rope_theta", 1e4))),
            rope_scaling=_rope_scaling(rope),
            norm_epsilon=fields.get("rms_norm_eps", 1e-6),
            tie_head=fields.get("tie_word_embeddings", False),
            qkv_bias=family.qkv_bias,
            qk_norm=family.qk_norm,
        )
    except (TypeError, KeyError) as error:
        raise UserError(f"{name} is damaged: {error}; download it again.") from error


def _not_representable(fields: Mapping[str, Any], family: _Family) -> Iterator[str]:
    """Returns what a config.json asks for and stackjax does not have, by its name there."""
    for field, expected in {
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "partial_rotary_factor": 1.0,
        "quantization_config": None,
    }.items():
        value = fields.get(field)
        if value is not None and value != expected:
            yield f"{field} {value!r}"
    rope = _rope(fields)
    kind = _rope_type(rope)
    if kind not in ("default", "llama3"):
        yield f"rotary positions of the type {kind!r}"
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        yield f"partial_rotary_factor {rope['partial_rotary_factor']}"
    window = fields.get("sliding_window", family.sliding_window)
    # Qwen has a switch of its own; and what is longer than all contexts does nothing.
    slides = window is not None and fields.get("use_sliding_window", family.sliding_window)
    if slides and window < fields.get("max_position_embeddings", math.inf):
        yield f"attention over a sliding_window of {window}"
    kinds = set(fields.get("layer_types") or ()) - {"full_attention"}
    if kinds and not slides:
        yield f"layers of the type {min(kinds)!r}"


def _rope(fields: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns how positions rotate; before version 5, only what differed was written."""
    return fields.get("rope_parameters") or fields.get("rope_scaling") or {}


def _rope_type(rope: Mapping[str, Any]) -> str:
    return rope.get("rope_type") or rope.get("type") or "default"


def _rope_scaling(rope: Mapping[str, Any]) -> RopeScaling | None:
    if _rope_type(rope) == "default":
        return None
    return RopeScaling(
        factor=rope["factor"],
        low_freq_factor=rope["low_freq_factor"],
        high_freq_factor=rope["high_freq_factor"],
        original_seq_len=rope["original_max_position_embeddings"],
    )


def seq_len(fields: Mapping[str, Any]) -> int:
    """Returns the tokens of the longest text that the model of a config.json is meant for."""
    return fields.get("max_position_embeddings", 2048)


def config_fields(
    config: ModelConfig, dtype: str | None, template: Mapping[str, Any] | None, seq_len: int
) -> dict[str, Any]:
    """Returns the config.json of a model.

    Args:
      dtype: The type of its weights: bfloat16.
      template: The config.json of a model that this one comes from, whose other fields stay;
        None if there is none.
      seq_len: Tokens of the longest text that the model is meant for, without a template.

    Raises:
      UserError: No model of transformers is like it.
    """
    fields = dict(template) if template else _new_fields(config, seq_len)
    kind = fields["model_type"]
    family = _FAMILIES[kind]
    if (config.qkv_bias, config.qk_norm) != (family.qkv_bias, family.qk_norm):
        raise UserError(
            f"model.qkv_bias is {config.qkv_bias} and model.qk_norm {config.qk_norm}, and no "
            f"model of the kind {kind} is like that."
        )
    if kind == "llama" and config.embed_dim % config.num_heads:
        raise UserError(
            f"model.embed_dim is {config.embed_dim}, which model.num_heads "
            f"{config.num_heads} does not divide, as transformers wants it of a Llama."
        )
    fields |= {theirs: getattr(config, ours) for ours, theirs in _FIELDS.items()}
    fields["num_key_value_heads"] = config.num_kv_heads
    if "head_dim" in fields or config.head_dim * config.num_heads != config.embed_dim:
        fields["head_dim"] = config.head_dim
    fields["rms_norm_eps"] = config.norm_epsilon
    fields["tie_word_embeddings"] = config.tie_head
    fields["dtype" if "dtype" in fields else "torch_dtype"] = dtype
    if fields.get("layer_types"):
        fields["layer_types"] = ["full_attention"] * config.num_layers
    before = model_config(fields)
    if (before.rope_theta, before.rope_scaling) != (config.rope_theta, config.rope_scaling):
        fields = {name: value for name, value in fields.items() if name != "rope_parameters"}
        fields |= _rope_fields(config)
    return fields


def _new_fields(config: ModelConfig, seq_len: int) -> dict[str, Any]:
    kind = "qwen3" if config.qk_norm else "qwen2" if config.qkv_bias else "llama"
    return {
        "architectures": [_FAMILIES[kind].architecture],
        "model_type": kind,
        "hidden_act": "silu",
        "max_position_embeddings": seq_len,
        "bos_token_id": None,
        "eos_token_id": None,
        **_rope_fields(config),
    }


def _rope_fields(config: ModelConfig) -> dict[str, Any]:
    """Returns how positions rotate, as versions before 5 wrote it and all can read it."""
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
