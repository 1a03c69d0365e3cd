"""Muon."""

import dataclasses
import math
from typing import TYPE_CHECKING, Any

from stackjax.optimizers.adamw import AdamW
from stackjax.runtime.numbers import Decay

if TYPE_CHECKING:
    import optax

    from stackjax.model.parametrization import Ratios
    from stackjax.sharding.axes import Axes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Muon(AdamW):
    """Muon (arXiv:2502.16982) for matrices in layers, AdamW for other parameters.

    Matrix updates have the size of AdamW updates.
    """

    momentum: Decay = 0.95
    """Momentum decay."""

    def decays(self) -> dict[str, float]:
        """Returns all moment decays, by field name."""
        return super().decays() | {"momentum": self.momentum}

    def build(self, axes: Any) -> "optax.GradientTransformation":
        """Returns clipping, Muon and Adam, and weight decay for matrices only."""
        from stackjax.optimizers.scale_by_muon import muon  # imports JAX

        return muon(self, axes)

    def build_scaled(self, axes: Any, ratios: Any) -> "optax.GradientTransformation":
        """Returns `build` with CompleteP's factors.

        Muon's epsilon is added to the norm of a matrix. Entries of the gradient have the ratio
        1 / (m_N m_L), the norm m_N times as much: the epsilon is divided by m_L.
        """
        from stackjax.optimizers.scale_by_muon import muon  # imports JAX

        return muon(self, axes, ratios)

    def rate_factor(self, axes: "Axes", ratios: "Ratios") -> float:
        """Returns a parameter's learning-rate factor under CompleteP.

        The spectral norm of an update must be proportional to sqrt(fan-out / fan-in)
        (arXiv:2310.17813). With the size of AdamW updates, it is proportional to the square
        root of the larger fan. If both fans have the same ratio, the factor is 1 / sqrt(ratio).
        Other parameters have AdamW's factor.
        """
        if axes.stacked and axes.reads:
            return math.sqrt(ratios.fan_out / (ratios.fan_in * ratios.largest_fan))
        return super().rate_factor(axes, ratios)
