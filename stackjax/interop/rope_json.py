"""Rotary positions in config.json."""

import math
from collections.abc import Mapping
from typing import Any

from stackjax.interop.families import (
    LINEAR_RULES,
    LLAMA3_RULES,
    ROPE_RULES,
    SHARE_RULE,
    YARN_RULES,
    Family,
)
from stackjax.interop.rule import Rule, check_fields, shown
from stackjax.model import ModelConfig
from stackjax.model.config import RopeScaling
from stackjax.runtime.errors import UserError

Rope = tuple[float, RopeScaling | None]
"""Rotary frequency base and scaling."""
_RULES = {"linear": LINEAR_RULES, "llama3": LLAMA3_RULES, "yarn": YARN_RULES}
_OPTIONAL = ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")
_OPTIONAL += ("truncate",)
_ORIGINAL, _SHARE = "original_max_position_embeddings", "partial_rotary_factor"
_GLOBAL, _LOCAL = "full_attention", "sliding_attention"


def read_rope(
    fields: Mapping[str, Any], family: Family, seq_len: int, name: str
) -> tuple[Rope, Rope | None]:
    """Returns the model's rotation, and the one for layers that slide, if separate.

    Defaults are as in transformers. `rope_scaling` (before version 5) has priority over
    `rope_parameters`; with rotations by layer type, it adds to the global layers' rotation.

    Raises:
      UserError: A field is malformed or unsupported.
    """
    source = _source(fields)
    rope = dict(fields.get(source) or {})
    if family.local_rope_theta is None:
        nested = [key for key, value in rope.items() if isinstance(value, dict)]
        if nested:
            raise UserError(
                f"{name} has {source} for {shown(nested[0])} only, which stackjax cannot "
                f"represent."
            )
        theta = family.rope_theta
        return _read(rope, fields, family, theta, family.theta_field, seq_len, name), None
    by_type = dict(fields.get("rope_parameters") or {})
    for key, value in by_type.items():
        if key not in (_GLOBAL, _LOCAL) or not isinstance(value, dict | None):
            raise UserError(
                f"{name}: rope_parameters has {key} {shown(value)}; it must have an object for "
                f"{_GLOBAL} and {_LOCAL}."
            )
    of_global = dict(by_type.get(_GLOBAL) or {}) | dict(fields.get("rope_scaling") or {})
    of_local = dict(by_type.get(_LOCAL) or {})
    theta, local = family.rope_theta, family.local_rope_theta
    return (
        _read(of_global, fields, family, theta, family.theta_field, seq_len, name),
        _read(of_local, fields, family, local, "rope_local_base_freq", seq_len, name),
    )


def read_rotary_share(fields: Mapping[str, Any], family: Family, name: str) -> float:
    """Returns the share of rotary channels.

    Raises:
      UserError: It is malformed.
    """
    if family.rotary_share is None:
        return 1.0
    field, default = family.rotary_share
    rope = fields.get(_source(fields)) or {}
    share = {field: fields.get(field, default)}
    if _SHARE in rope:
        share = {_SHARE: rope[_SHARE]}
    check_fields(share, dict.fromkeys(share, SHARE_RULE), name)
    return float(*share.values())


def _source(fields: Mapping[str, Any]) -> str:
    return "rope_scaling" if fields.get("rope_scaling") else "rope_parameters"


def _read(
    rope: dict[str, Any],
    fields: Mapping[str, Any],
    family: Family,
    theta: float,
    theta_field: str,
    seq_len: int,
    name: str,
) -> Rope:
    """Returns a rotation.

    Args:
      theta, theta_field: Default base, and the field outside `rope` with it.
    """
    source = _source(fields)
    rope.setdefault("rope_type", rope.get("type", "default"))
    rope.setdefault("rope_theta", fields.get(theta_field, theta))
    kind = Rule((str,), supported=family.rope_types)
    check_fields(rope, ROPE_RULES | {"rope_type": kind}, f"{source} in {name}")
    if rope["rope_type"] in _RULES:
        rules = _RULES[rope["rope_type"]]
        # Transformers prefers the top-level field.
        rope[_ORIGINAL] = fields.get(_ORIGINAL, rope.get(_ORIGINAL, seq_len))
        missing = [field for field in rules if field not in rope and field not in _OPTIONAL]
        if missing:
            raise UserError(f"{name} lacks {', '.join(missing)} in {source}.")
        if family.rotary_share is None:
            rope.setdefault(_SHARE, fields.get(_SHARE))
            rules = rules | {_SHARE: Rule((int, float), or_null=True, supported=(None, 1))}
        check_fields(rope, rules, f"{source} in {name}")
    return float(rope["rope_theta"]), _scaling(rope, seq_len)


def _scaling(rope: Mapping[str, Any], seq_len: int) -> RopeScaling | None:
    if rope["rope_type"] == "default":
        return None
    if rope["rope_type"] == "linear":
        return RopeScaling(factor=rope["factor"], method="linear")
    if rope["rope_type"] == "yarn":
        factor = rope["factor"]
        factor = seq_len / rope[_ORIGINAL] if factor is None else factor
        return RopeScaling(
            factor=factor,
            low_freq_factor=rope.get("beta_slow") or 1.0,
            high_freq_factor=rope.get("beta_fast") or 32.0,
            original_seq_len=rope[_ORIGINAL],
            attention_factor=_attention_factor(rope, factor),
            truncate=rope.get("truncate", True),
            method="yarn",
        )
    return RopeScaling(
        factor=rope["factor"],
        low_freq_factor=rope["low_freq_factor"],
        high_freq_factor=rope["high_freq_factor"],
        original_seq_len=rope[_ORIGINAL],
    )


def _attention_factor(rope: Mapping[str, Any], factor: float) -> float | None:
    """Returns the factor of YaRN's queries and keys; None for the paper's."""
    found, scale, scale_all = map(rope.get, ("attention_factor", "mscale", "mscale_all_dim"))
    if found is None and scale and scale_all:
        log = math.log(max(1, factor)) / 10
        return (scale * log + 1) / (scale_all * log + 1)
    return found


def write_rope(
    fields: Mapping[str, Any], family: Family, config: ModelConfig
) -> dict[str, Any]:
    """Returns fields with the model's rotation, in the format before version 5.

    All versions can read it. Separate rotations for layers that slide are in the format for
    version 5, too.
    """
    other = ("rope_parameters", _ORIGINAL, _SHARE)
    kept = {name: value for name, value in fields.items() if name not in other}
    whole = config.rope_theta, config.rope_scaling
    if family.local_rope_theta is None:
        changed = {family.theta_field: config.rope_theta, "rope_scaling": _written(whole[1])}
        if family.rotary_share is not None:
            changed[family.rotary_share[0]] = config.rotary_share
        return kept | changed
    local = next((k for k in config.kinds if k.rope_theta is not None), None)
    own = whole if local is None else (local.rope_theta, local.rope_scaling)
    kept.pop("rope_scaling", None)
    return kept | {
        "rope_theta": config.rope_theta,
        "rope_local_base_freq": own[0],
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": theta} | (_written(scaling) or {})
            for kind, (theta, scaling) in ((_GLOBAL, whole), (_LOCAL, own))
        },
    }


def _written(scaling: RopeScaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    if scaling.method == "linear":
        return {"rope_type": "linear", "factor": scaling.factor}
    if scaling.method == "yarn":
        return {
            "rope_type": "yarn",
            "factor": scaling.factor,
            "beta_slow": scaling.low_freq_factor,
            "beta_fast": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_seq_len,
            "attention_factor": scaling.attention_factor,
            "truncate": scaling.truncate,
        }
    return {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_seq_len,
    }
