"""Rotary positions in config.json."""

from collections.abc import Mapping
from typing import Any

from stackjax.interop.families import LINEAR_RULES, LLAMA3_RULES, ROPE_RULES, Family
from stackjax.interop.rule import check_fields, shown
from stackjax.model import ModelConfig
from stackjax.model.config import RopeScaling
from stackjax.runtime.errors import UserError

Rope = tuple[float, RopeScaling | None]
"""Rotary frequency base and scaling."""
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
    source = "rope_scaling" if fields.get("rope_scaling") else "rope_parameters"
    rope = dict(fields.get(source) or {})
    if family.local_rope_theta is None:
        nested = [key for key, value in rope.items() if isinstance(value, dict)]
        if nested:
            raise UserError(
                f"{name} has {source} for {shown(nested[0])} only, which stackjax cannot "
                f"represent."
            )
        return _read(rope, fields, family.rope_theta, "rope_theta", seq_len, source, name), None
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
        _read(of_global, fields, theta, "rope_theta", seq_len, source, name),
        _read(of_local, fields, local, "rope_local_base_freq", seq_len, source, name),
    )


def _read(
    rope: dict[str, Any],
    fields: Mapping[str, Any],
    theta: float,
    theta_field: str,
    seq_len: int,
    source: str,
    name: str,
) -> Rope:
    """Returns a rotation.

    Args:
      theta, theta_field: Default base, and the field outside `rope` with it.
      source: Field with `rope`, for messages.
    """
    rope.setdefault("rope_type", rope.get("type", "default"))
    rope.setdefault("rope_theta", fields.get(theta_field, theta))
    rules = ROPE_RULES
    if rope["rope_type"] in ("linear", "llama3"):
        rules = ROPE_RULES | (LINEAR_RULES if rope["rope_type"] == "linear" else LLAMA3_RULES)
        rope.setdefault("partial_rotary_factor", fields.get("partial_rotary_factor"))
        original = "original_max_position_embeddings"
        # Transformers prefers the top-level field.
        rope[original] = fields.get(original, rope.get(original, seq_len))
        missing = [field for field in rules if field not in rope]
        if missing:
            raise UserError(f"{name} lacks {', '.join(missing)} in {source}.")
    check_fields(rope, rules, f"{source} in {name}")
    return float(rope["rope_theta"]), _scaling(rope)


def _scaling(rope: Mapping[str, Any]) -> RopeScaling | None:
    if rope["rope_type"] == "default":
        return None
    if rope["rope_type"] == "linear":
        return RopeScaling(factor=rope["factor"], method="linear")
    return RopeScaling(
        factor=rope["factor"],
        low_freq_factor=rope["low_freq_factor"],
        high_freq_factor=rope["high_freq_factor"],
        original_seq_len=rope["original_max_position_embeddings"],
    )


def write_rope(
    fields: Mapping[str, Any], family: Family, config: ModelConfig
) -> dict[str, Any]:
    """Returns fields with the model's rotation, in the format before version 5.

    All versions can read it. Separate rotations for layers that slide are in the format for
    version 5, too.
    """
    other = ("rope_parameters", "original_max_position_embeddings", "partial_rotary_factor")
    kept = {name: value for name, value in fields.items() if name not in other}
    whole = config.rope_theta, config.rope_scaling
    if family.local_rope_theta is None:
        return kept | {"rope_theta": config.rope_theta, "rope_scaling": _written(whole[1])}
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
    return {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_seq_len,
    }
