"""Conversion between config.json and `ModelConfig`, for the families in `families.py`."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stackjax.files.paths import file_inside
from stackjax.interop.families import ACTIVATIONS, FAMILIES, RULES, SIZES, Family, family_of
from stackjax.interop.layer_types import read_pattern, write_layers
from stackjax.interop.rope_json import read_rope, write_rope
from stackjax.interop.rule import Rule, check_fields, shown
from stackjax.model import ModelConfig
from stackjax.model.config import differences
from stackjax.model.flops import describe
from stackjax.model.layer_kind import LayerKind
from stackjax.model.masking import Masking
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
    activation = {family.activation_field: Rule((str,), supported=tuple(ACTIVATIONS))}
    check_fields(fields, {**RULES, **activation, **family.rules}, name)
    sizes = {ours: fields[theirs] for ours, theirs in SIZES.items()}
    _check_heads(fields, family, name)
    _check_padding(fields, name)
    num_kv_heads = fields.get("num_key_value_heads", family.num_kv_heads)
    head_dim = fields.get("head_dim", family.head_dim)
    try:
        (theta, scaling), local_rope = read_rope(fields, family, seq_len(fields), name)
        model = ModelConfig(
            **sizes,
            head_dim=head_dim or sizes["embed_dim"] // sizes["num_heads"],
            num_kv_heads=num_kv_heads or sizes["num_heads"],
            rope_theta=theta,
            rope_scaling=scaling,
            norm_epsilon=fields.get("rms_norm_eps", family.norm_epsilon),
            tie_head=fields.get("tie_word_embeddings", family.tie_head),
            activation=ACTIVATIONS[fields.get(family.activation_field, family.activation)],
            **family.fixed,
            **{
                ours: fields.get(theirs, default)
                for ours, (theirs, default) in family.numbers.items()
            },
        )
        # Now `num_layers` is in range.
        pattern = read_pattern(fields, family, local_rope, seq_len(fields), name)
        return dataclasses.replace(model, pattern=pattern)
    except UserError as error:
        if str(error).startswith(name):
            raise
        raise UserError(f"{name}: {error}") from error


def _family(fields: Mapping[str, Any], name: str) -> Family:
    kind = fields["model_type"]
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise UserError(
            f"{name}: model_type is {shown(kind)}; it must be {', '.join(FAMILIES)}."
        )
    return FAMILIES[kind]


def _check_heads(fields: Mapping[str, Any], family: Family, name: str) -> None:
    """Raises UserError if the heads have to divide `hidden_size`, and do not."""
    channels, heads = fields["hidden_size"], fields["num_attention_heads"]
    if family.heads_divide and channels % heads:
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
    family = FAMILIES[fields["model_type"]]
    _check_family(config, fields["model_type"])
    fields |= {theirs: getattr(config, ours) for ours, theirs in SIZES.items()}
    fields["num_key_value_heads"] = config.num_kv_heads
    head_dim = family.head_dim or config.embed_dim / config.num_heads
    if "head_dim" in fields or config.head_dim != head_dim:
        fields["head_dim"] = config.head_dim
    fields["rms_norm_eps"] = float(config.norm_epsilon)
    fields["tie_word_embeddings"] = config.tie_head
    if dtype is not None:
        fields["dtype" if "dtype" in fields else "torch_dtype"] = dtype
    if _seq_len(fields, family) < seq_len:
        fields["max_position_embeddings"] = seq_len
    fields = _with_layers(_with_numbers(fields, family, config), family, config)
    _check_same_model(config, fields)
    return fields


def _seq_len(fields: Mapping[str, Any], family: Family) -> int:
    return fields.get("max_position_embeddings", family.seq_len)


def _with_numbers(
    fields: Mapping[str, Any], family: Family, config: ModelConfig
) -> dict[str, Any]:
    """Returns fields with the model's activation and the family's own numbers."""
    changed = dict(fields)
    found = ACTIVATIONS.get(fields.get(family.activation_field, family.activation))
    if found != config.activation:
        names = {ours: theirs for theirs, ours in reversed([*ACTIVATIONS.items()])}
        changed[family.activation_field] = names[config.activation]
    for ours, (theirs, default) in family.numbers.items():
        value: float | None = getattr(_explicit(config, seq_len(fields)), ours)
        if fields.get(theirs, default) != value:
            # The divisor is an integer in transformers.
            if isinstance(default, int) and value is not None and value.is_integer():
                value = int(value)
            changed[theirs] = value
    return changed


def _with_layers(
    fields: Mapping[str, Any], family: Family, config: ModelConfig
) -> dict[str, Any]:
    """Returns fields with the model's windows and rotations; unchanged if equivalent."""
    changed = dict(fields)
    listed = fields.get("layer_types")
    if listed and len(listed) != config.num_layers:
        changed = write_layers(changed, family, config)
    if model_config(changed).kinds != config.kinds:
        changed = write_layers(changed, family, config)
    found = model_config(changed)
    rotations = [(each.rope_theta, each.rope_scaling, each.kinds) for each in (found, config)]
    return changed if rotations[0] == rotations[1] else write_rope(changed, family, config)


def _explicit(config: ModelConfig, seq_len: int) -> ModelConfig:
    """Returns the model with its defaults written out, for texts of up to `seq_len` tokens."""

    def explicit(kind: LayerKind) -> LayerKind:
        window = Masking(kind.window).within(seq_len).window
        if not kind.rotary or kind.rope_theta is not None:
            return dataclasses.replace(kind, window=window)
        theta, scaling = config.rope_theta, config.rope_scaling
        return LayerKind(window=window, rope_theta=theta, rope_scaling=scaling)

    return dataclasses.replace(
        config,
        query_scale=config.query_scale or float(config.head_dim),
        pattern=tuple(map(explicit, config.kinds)),
    )


def _check_same_model(config: ModelConfig, fields: Mapping[str, Any]) -> None:
    """Raises UserError if a config.json describes another model."""
    models = (_explicit(each, seq_len(fields)) for each in (config, model_config(fields)))
    if lost := differences(*models, besides=("vocab_multiple",)):
        raise UserError(
            f"config.json of model_type {fields['model_type']} cannot hold this model: {lost}; "
            f"for a new field, extend config_fields and model_config (docs/interop.md)."
        )


def _check_family(config: ModelConfig, kind: str) -> None:
    """Raises UserError if a family cannot represent the model."""
    family = FAMILIES[kind]
    other = [
        f"model.{name} {getattr(config, name)}"
        for name, value in family.fixed.items()
        if getattr(config, name) != value
    ]
    if other:
        raise UserError(f"model_type {kind} does not support {' and '.join(other)}.")
    if family.heads_divide and config.embed_dim % config.num_heads:
        raise UserError(
            f"model.num_heads {config.num_heads} does not divide model.embed_dim "
            f"{config.embed_dim}, as transformers requires for {kind}."
        )


def _new_fields(config: ModelConfig, seq_len: int) -> dict[str, Any]:
    kind = family_of(config)
    if kind is None:
        raise UserError(
            f"no model_type has the architecture of this model ({describe(config)}), so it "
            f"cannot be exported; stackjax reads its checkpoints."
        )
    family = FAMILIES[kind]
    return {
        "architectures": [family.architecture],
        "model_type": kind,
        family.activation_field: family.activation,
        "max_position_embeddings": seq_len,
        "bos_token_id": None,
        "eos_token_id": None,
        **write_rope({}, family, config),
    }
