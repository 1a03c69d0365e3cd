"""Conversion between config.json and `ModelConfig`, for the families in `families.py`."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stackjax.files.paths import file_inside
from stackjax.interop.families import ACTIVATIONS, FAMILIES, RULES, SIZES, Family, family_of
from stackjax.interop.layer_types import read_pattern, write_layers
from stackjax.interop.rope_json import read_rope, read_rotary_share, write_rope
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
    return _read(_standard(fields, family, name), family, name)


def _standard(fields: Mapping[str, Any], family: Family, name: str = CONFIG) -> dict[str, Any]:
    """Returns the fields with Llama's names, without those that transformers does not read."""
    known = set(family.names.values())
    found = {key: v for key, v in fields.items() if key not in known or key in family.aliases}
    for theirs, ours in family.names.items():
        if theirs in fields:
            if ours in found:
                raise UserError(f"{name} has both {theirs} and {ours}; leave out {ours}.")
            found[ours] = found.pop(theirs)
    return found


def _own_names(fields: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """Returns fields with the family's names, from fields with Llama's."""
    names = {ours: theirs for theirs, ours in family.names.items()}
    return {names.get(key, key): value for key, value in fields.items()}


def _read(fields: Mapping[str, Any], family: Family, name: str = CONFIG) -> ModelConfig:
    """Returns `model_config` for fields with Llama's names."""
    activation = {family.activation_field: Rule((str,), supported=tuple(ACTIVATIONS))}
    flags = dict.fromkeys(family.flags, Rule((bool,)))
    rules = {**RULES, **activation, **flags, **family.rules}
    rules = {key: rule for key, rule in rules.items() if key not in family.unread}
    check_fields(_own_names(fields, family), _own_names(rules, family), name)
    if family.mlp_ratio is not None and "hidden_size" in fields:
        units = fields.get("intermediate_size") or family.mlp_ratio * fields["hidden_size"]
        fields = {**fields, "intermediate_size": units}
    missing = [field for field in SIZES.values() if field not in fields]
    if missing:
        missing = _own_names(dict.fromkeys(missing), family)
        raise UserError(f"{name} lacks {', '.join(missing)}; download it again.")
    sizes = {ours: fields[theirs] for ours, theirs in SIZES.items()}
    _check_heads(fields, family, name)
    _check_padding(fields, name)
    heads = {key: v for key, v in fields.items() if key not in family.unread}
    num_kv_heads = heads.get("num_key_value_heads", family.num_kv_heads)
    head_dim = heads.get("head_dim", family.head_dim)
    length = _seq_len(fields, family)
    is_rotary = family.fixed["positions"] == "rotary"
    try:
        (theta, scaling), local_rope = (1e4, None), None
        if is_rotary:
            (theta, scaling), local_rope = read_rope(fields, family, length, name)
        model = ModelConfig(
            **sizes,
            head_dim=head_dim or sizes["embed_dim"] // sizes["num_heads"],
            num_kv_heads=num_kv_heads or sizes["num_heads"],
            max_seq_len=None if is_rotary else length,
            rope_theta=theta,
            rope_scaling=scaling,
            norm_epsilon=fields.get("rms_norm_eps", family.norm_epsilon),
            tie_head=fields.get("tie_word_embeddings", family.tie_head),
            activation=ACTIVATIONS[fields.get(family.activation_field, family.activation)],
            rotary_share=read_rotary_share(fields, family, name),
            **{ours: value for ours, value in family.fixed.items() if ours != "rotary_share"},
            **{
                ours: fields.get(theirs, default)
                for theirs, (default, names) in family.flags.items()
                for ours in names
            },
            **{
                ours: fields.get(theirs, default)
                for ours, (theirs, default) in family.numbers.items()
            },
        )
        # Now `num_layers` is in range.
        pattern = read_pattern(fields, family, local_rope, length, name)
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
    """Raises UserError if the heads have to divide `hidden_size`, and do not.

    Or if a size of the heads is given that only the rotation would have.
    """
    channels, heads = fields["hidden_size"], fields["num_attention_heads"]
    turned = None if family.has_heads or not family.rotary_share else fields.get("head_dim")
    if turned is not None and turned != channels / heads:
        raise UserError(
            f"{name} has head_dim {shown(turned)}, which stackjax cannot represent; the heads "
            f"have {channels / heads:g} channels."
        )
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
    family = FAMILIES[fields["model_type"]]
    return _seq_len(_standard(fields, family), family)


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
    fields = _standard(template, FAMILIES[template["model_type"]]) if template else None
    fields = fields or _new_fields(config, seq_len)
    family = FAMILIES[fields["model_type"]]
    _check_family(config, fields["model_type"])
    fields |= _sizes(config, family, fields)
    fields["rms_norm_eps"] = float(config.norm_epsilon)
    fields["tie_word_embeddings"] = config.tie_head
    if dtype is not None:
        fields["dtype" if "dtype" in fields else "torch_dtype"] = dtype
    if config.max_seq_len is not None:
        fields["max_position_embeddings"] = config.max_seq_len
    elif _seq_len(fields, family) < seq_len:
        fields["max_position_embeddings"] = seq_len
    fields = _with_layers(_with_numbers(fields, family, config), family, config)
    _check_same_model(config, fields)
    # Fields that only other families read stay as they were.
    kept = {key: v for key, v in (template or {}).items() if key in family.names.values()}
    own = _own_names(fields, family)
    return {key: v for key, v in kept.items() if key not in family.aliases} | own


def _sizes(config: ModelConfig, family: Family, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Returns fields with the model's sizes."""
    sizes = {theirs: getattr(config, ours) for ours, theirs in SIZES.items()}
    units = "intermediate_size"
    is_default = config.mlp_dim == (family.mlp_ratio or 0) * config.embed_dim
    if is_default and fields.get(units) is None:
        del sizes[units]
    if family.has_heads:
        sizes["num_key_value_heads"] = config.num_kv_heads
        head_dim = family.head_dim or config.embed_dim / config.num_heads
        if "head_dim" in fields or config.head_dim != head_dim:
            sizes["head_dim"] = config.head_dim
    return sizes


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
    explicit = _explicit(config, _seq_len(fields, family))
    for ours, (theirs, default) in family.numbers.items():
        value: float | None = getattr(explicit, ours)
        if fields.get(theirs, default) != value:
            # The divisor is an integer in transformers.
            if isinstance(default, int) and value is not None and value.is_integer():
                value = int(value)
            changed[theirs] = value
    for theirs, (default, names) in family.flags.items():
        flag = getattr(config, names[0])
        if fields.get(theirs, default) != flag:
            changed[theirs] = flag
    return changed


def _with_layers(
    fields: Mapping[str, Any], family: Family, config: ModelConfig
) -> dict[str, Any]:
    """Returns fields with the model's windows and rotations; unchanged if equivalent."""
    changed = dict(fields)
    lists = [fields.get(name) or () for name in ("layer_types", "no_rope_layers")]
    if any(len(listed) not in (0, config.num_layers) for listed in lists):
        changed = write_layers(changed, family, config)
    found = _read(changed, family)
    if found.kinds != config.kinds:
        changed = write_layers(changed, family, config)
        found = _read(changed, family)
    rotations = [
        (each.rope_theta, each.rope_scaling, each.rotary_share, each.kinds)
        for each in (found, config)
    ]
    return changed if rotations[0] == rotations[1] else write_rope(changed, family, config)


def _explicit(config: ModelConfig, seq_len: int) -> ModelConfig:
    """Returns the model with its defaults written out, for texts of up to `seq_len` tokens."""

    def explicit(kind: LayerKind) -> LayerKind:
        window = Masking(kind.window).within(seq_len).window
        kind = dataclasses.replace(kind, window=window)
        is_rotary = kind.rotary and config.positions == "rotary"
        if not is_rotary or kind.rope_theta is not None:
            return kind
        theta, scaling = config.rope_theta, config.rope_scaling
        return dataclasses.replace(kind, rope_theta=theta, rope_scaling=scaling)

    return dataclasses.replace(
        config,
        query_scale=config.query_scale or float(config.head_dim),
        pattern=tuple(map(explicit, config.kinds)),
    )


def _check_same_model(config: ModelConfig, fields: Mapping[str, Any]) -> None:
    """Raises UserError if a config.json describes another model."""
    family = FAMILIES[fields["model_type"]]
    length, found = _seq_len(fields, family), _read(fields, family)
    models = (_explicit(each, length) for each in (config, found))
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
        # The class's default may not be in the vocabulary.
        "pad_token_id": None,
        **({} if config.positions == "learned" else write_rope({}, family, config)),
    }
