"""Layer kinds: attention window, rotary positions, and experts."""

import dataclasses
from typing import Annotated, Literal

from stackjax.runtime.constraints import check_fields
from stackjax.runtime.errors import UserError
from stackjax.runtime.numbers import Positive, Size
from stackjax.runtime.ranges import Real, Whole


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Rotary frequency scaling for longer contexts, as in Llama 3.1 (arXiv:2407.21783).

    With `method` "linear", all frequencies are divided by `factor`, and no other field counts.
    Otherwise, frequencies below `low_freq_factor` turns per original context are divided by
    `factor`. Frequencies above `high_freq_factor` turns stay the same. In between, the scale is
    interpolated linearly: in the number of turns for "llama3", in the number of the channel for
    "yarn" (arXiv:2309.00071), which also multiplies rotated queries and keys.
    """

    factor: Annotated[float, Real(at_least=1)] = 8.0
    """Divisor for the lowest frequencies."""
    low_freq_factor: Positive = 1.0
    """Turns per original context; lower frequencies are divided by `factor`."""
    high_freq_factor: Positive = 4.0
    """Turns per original context; higher frequencies stay the same."""
    original_seq_len: Annotated[int, Whole(at_least=1, at_most=2**31 - 1)] = 8192
    """Original context length in tokens."""
    method: Literal["llama3", "linear", "yarn"] = "llama3"
    """Frequencies that are divided: `llama3` and `yarn` low frequencies, `linear` all."""
    attention_factor: Positive | None = None
    """YaRN's factor of rotated queries and keys; by default 0.1 ln(factor) + 1."""
    truncate: bool = True
    """Whether YaRN interpolates between whole numbers of channels."""

    def __post_init__(self):
        check_fields(self, "model.rope_scaling")
        if self.low_freq_factor >= self.high_freq_factor:
            raise UserError(
                f"model.rope_scaling.high_freq_factor is {self.high_freq_factor}; it must be "
                f"more than model.rope_scaling.low_freq_factor, {self.low_freq_factor}."
            )
        plain = self.attention_factor is None and self.truncate
        if self.method != "yarn" and not plain:
            raise UserError(
                f"model.rope_scaling has attention_factor {self.attention_factor} and truncate "
                f"{self.truncate}, which belong to method 'yarn', not {self.method!r}; leave "
                f"both out."
            )


def check_rotation(theta: float, scaling: RopeScaling | None, name: str) -> None:
    """Raises UserError for a base without YaRN scaling."""
    if scaling is not None and scaling.method == "yarn" and theta == 1:
        raise UserError(
            f"{name}.rope_theta is {theta}; for rope_scaling with method 'yarn', it must be "
            f"above 1."
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerKind:
    """Differences between layers."""

    window: Size | None = None
    """Tokens that a query attends to, with its own; None for all tokens before it."""
    rotary: bool = True
    """Whether queries and keys have rotary positions."""
    rope_theta: Annotated[float, Real(at_least=1)] | None = None
    """Rotary frequency base with `rope_scaling` below; None for the model's base and
    scaling."""
    rope_scaling: RopeScaling | None = None
    """Rotary frequency scaling, next to an own `rope_theta`."""
    dense: bool = False
    """Whether the layer has one MLP, in a model with experts."""

    def __post_init__(self):
        check_fields(self, "model.pattern")
        if self.rope_theta is not None:
            check_rotation(self.rope_theta, self.rope_scaling, "model.pattern")
        if self.rope_scaling is not None and self.rope_theta is None:
            raise UserError(
                "model.pattern has a kind with rope_scaling and without rope_theta; set both, "
                "or neither for the model's base and scaling."
            )

    @property
    def angles(self) -> tuple[bool, float | None, RopeScaling | None]:
        """Kinds with equal entries share rotary angles."""
        return self.rotary, self.rope_theta, self.rope_scaling

    def __str__(self) -> str:
        """The kind in words, such as `window 512`."""
        parts = [f"window {self.window}" if self.window else "global"]
        if not self.rotary:
            parts.append("not rotary")
        if self.rope_theta is not None:
            parts.append(f"rope_theta {self.rope_theta:g}")
        if self.rope_scaling is not None:
            parts.append(f"scaled {self.rope_scaling.factor:g} times")
        if self.dense:
            parts.append("dense")
        return ", ".join(parts)
