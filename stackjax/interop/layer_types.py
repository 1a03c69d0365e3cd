"""Layer kinds in config.json: `layer_types`, sliding windows and rotations by type."""

from collections.abc import Mapping, Sequence
from typing import Any

from stackjax.interop.families import Family
from stackjax.interop.rule import shown
from stackjax.model import ModelConfig
from stackjax.model.config import RopeScaling
from stackjax.model.layer_kind import LayerKind
from stackjax.runtime.errors import UserError

_KNOWN = ("full_attention", "attention", "sliding_attention")
_SLIDES = "sliding_attention"
_NO_ROPE = "no_rope_layers"


def read_pattern(
    fields: Mapping[str, Any],
    family: Family,
    local_rope: tuple[float, RopeScaling | None] | None,
    seq_len: int,
    name: str,
) -> tuple[LayerKind, ...]:
    """Returns the shortest pattern for a config.json's layers; empty for global attention.

    A window as long as the longest context counts as none, in families where it can be unset.

    Args:
      local_rope: Rotary base and scaling in layers that slide, if separate.
      seq_len: The longest context.
      name: File name for messages.

    Raises:
      UserError: `layer_types` or the window is malformed, or has no equivalent.
    """
    _check_types(fields, name)
    turns = _turns(fields, family, name)
    window, slides = _window(fields, family), _slides(fields, family)
    if any(slides) and window is None:
        raise UserError(
            f"{name}: layer_types has 'sliding_attention', but sliding_window is null."
        )
    if any(slides) and window is not None and window < 1:
        raise UserError(f"{name}: sliding_window is {window}; it must be at least 1, or null.")
    if family.window == "cache":
        if any(slides) and window is not None and window < seq_len:
            raise UserError(
                f"{name} has a sliding_window of {window}, which stackjax cannot represent."
            )
        return ()
    if family.window != "listed" and window is not None and window >= seq_len:
        return ()
    theta, scaling = local_rope or (None, None)
    kinds = [
        LayerKind(window=window, rotary=turn, rope_theta=theta, rope_scaling=scaling)
        if slide
        else LayerKind(rotary=turn)
        for slide, turn in zip(slides, turns, strict=True)
    ]
    return shortest(kinds)


def shortest(kinds: Sequence[LayerKind]) -> tuple[LayerKind, ...]:
    """Returns the shortest pattern with these layers; empty if all are global."""
    if set(kinds) <= {LayerKind()}:
        return ()
    size = next(
        size
        for size in range(1, len(kinds) + 1)
        if all(kind == kinds[i % size] for i, kind in enumerate(kinds))
    )
    return tuple(kinds[:size])


def write_layers(
    fields: Mapping[str, Any], family: Family, config: ModelConfig
) -> dict[str, Any]:
    """Returns fields with the model's windows; a list of types has one for each layer."""
    slides = [kind.window is not None for kind in config.kinds]
    windows = [kind.window for kind in config.kinds if kind.window is not None]
    changed = dict(fields)
    if windows or family.window != "listed":
        changed["sliding_window"] = max(windows, default=None)
    if family.window == "switched":
        changed["use_sliding_window"] = any(slides)
        changed["max_window_layers"] = slides.index(True) if any(slides) else len(slides)
    if family.window in ("switched", "listed") or fields.get("layer_types"):
        changed["layer_types"] = [_SLIDES if slide else "full_attention" for slide in slides]
    if family.no_rope_interval is not None:
        changed[_NO_ROPE] = [int(kind.rotary) for kind in config.kinds]
        changed["use_sliding_window"] = any(slides)
    return changed


def _check_types(fields: Mapping[str, Any], name: str) -> None:
    """Raises UserError unless `layer_types` has a supported type for each layer."""
    kinds, num_layers = fields.get("layer_types"), fields["num_hidden_layers"]
    if kinds is None:
        return
    if len(kinds) != num_layers:
        raise UserError(
            f"{name}: layer_types has {len(kinds)} entries; num_hidden_layers is {num_layers}."
        )
    for kind in kinds:
        if kind not in _KNOWN:
            raise UserError(
                f"{name}: layer_types has {shown(kind)}, which stackjax cannot represent."
            )


def _turns(fields: Mapping[str, Any], family: Family, name: str) -> list[bool]:
    """Returns whether each layer has rotary positions.

    Raises:
      UserError: The list has another length, or other values than 0 and 1.
    """
    num_layers = fields["num_hidden_layers"]
    if family.no_rope_interval is None:
        return [True] * num_layers
    listed = fields.get(_NO_ROPE)
    if listed is None:
        interval = fields.get("no_rope_layer_interval", family.no_rope_interval)
        return [(i + 1) % interval != 0 for i in range(num_layers)]
    if len(listed) != num_layers or not all(type(i) is int and i in (0, 1) for i in listed):
        raise UserError(
            f"{name}: {_NO_ROPE} is {shown(listed)}; it must have 1, or 0 for a layer without "
            f"rotary positions, for each of the {num_layers} layers."
        )
    return [bool(each) for each in listed]


def _window(fields: Mapping[str, Any], family: Family) -> int | None:
    """Returns the sliding window in tokens; None if transformers uses none."""
    if family.window == "switched" and not fields.get("use_sliding_window", False):
        return None
    return fields.get("sliding_window", family.sliding_window)


def _slides(fields: Mapping[str, Any], family: Family) -> list[bool]:
    """Returns whether the window affects attention or the KV cache in each layer."""
    window, kinds = _window(fields, family), fields.get("layer_types")
    layers = range(fields["num_hidden_layers"])
    listed = [kind == _SLIDES for kind in kinds or ()]
    if family.window == "always" and window is not None:
        return [True for _ in layers]
    if kinds is not None:
        return listed
    if family.no_rope_interval is not None:
        switched = fields.get("use_sliding_window", False) and window is not None
        return [switched and not turn for turn in _turns(fields, family, "config.json")]
    if family.window == "listed":
        period = fields.get(family.period_field or "", family.period)
        return [(i + 1) % period != 0 for i in layers]
    first = fields.get("max_window_layers", 28) if family.window == "switched" else 0
    return [window is not None and i >= first for i in layers]
