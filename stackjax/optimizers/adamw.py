"""AdamW."""

import dataclasses
from typing import TYPE_CHECKING, Annotated, Any, Literal

from stackjax.optimizers.base import Optimizer
from stackjax.runtime.errors import UserError
from stackjax.runtime.numbers import Decay, Epsilon, Positive
from stackjax.runtime.ranges import Real

if TYPE_CHECKING:
    import optax

    from stackjax.model.parametrization import Ratios
    from stackjax.sharding.axes import Axes

MAX_BFLOAT16_DECAY = 0.98
"""Slowest decay for moments in bfloat16."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdamW(Optimizer):
    """AdamW (arXiv:1711.05101) after clipping by the global norm."""

    b1: Decay = 0.9
    """First-moment decay."""
    b2: Decay = 0.95
    """Second-moment decay."""
    epsilon: Epsilon = 1e-8
    """Added to the square root of the second moment."""
    weight_decay: Annotated[float, Real(at_least=0, at_most=100)] = 0.1
    """Decoupled weight decay, times the learning rate; norm gains have none."""
    clip_norm: Positive = 1.0
    """Largest global gradient norm."""
    moments_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type for stored moments. `bfloat16` halves the optimizer state and rounds moments to 8
    bits at every step, so decays may be at most 0.98."""

    def __post_init__(self):
        super().__post_init__()
        if self.moments_dtype == "bfloat16":
            _check_decays(self.decays())

    def decays(self) -> dict[str, float]:
        """Returns all moment decays, by field name."""
        return {"b1": self.b1, "b2": self.b2}

    def build(self, axes: Any) -> "optax.GradientTransformation":
        """Returns clipping, Adam, and weight decay for matrices only."""
        from stackjax.optimizers.scale_by_adam import adamw  # imports JAX

        return adamw(self, axes)

    def build_scaled(self, axes: Any, ratios: Any) -> "optax.GradientTransformation":
        """Returns `build` with CompleteP's factors (arXiv:2505.01618).

        Epsilon is divided by m_N, as the gradients are; in layers also by m_L. A factor of the
        learning rate is undone in the weight decay, so their product has no factor.
        """
        from stackjax.optimizers.scale_by_adam import adamw  # imports JAX

        return adamw(self, axes, ratios)

    def rate_factor(self, axes: "Axes", ratios: "Ratios") -> float:
        """Returns a parameter's learning-rate factor under CompleteP (arXiv:2505.01618).

        The factor is 1 / fan-in ratio for matrices in layers, and 1 for other parameters.
        """
        return 1 / ratios.fan_in if axes.stacked else 1.0

    def build_fit(self) -> "optax.GradientTransformation":
        """Returns clipping and Adam, for fits of learned growth."""
        from stackjax.optimizers.scale_by_adam import clipped_adam  # imports JAX

        return clipped_adam(self)


def _check_decays(decays: dict[str, float]) -> None:
    """Raises UserError if moments in bfloat16 would get stuck.

    A moment is stuck if a step changes less than half of the last bit, a relative 2**-8. The
    relative error is up to 2**-8 / (1 - decay), a fifth at 0.98. From 0.996 on, the second
    moment never falls.
    """
    for field, decay in decays.items():
        if decay > MAX_BFLOAT16_DECAY:
            raise UserError(
                f"optimizer.{field} is {decay}, and optimizer.moments_dtype is 'bfloat16', "
                f"whose 8 bits lose changes as small as {1 - decay:.2g} of a moment; use at "
                f"most {MAX_BFLOAT16_DECAY}, or float32."
            )
