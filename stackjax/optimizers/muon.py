"""Muon."""

import dataclasses
from typing import TYPE_CHECKING, Any

from stackjax.optimizers.adamw import AdamW
from stackjax.runtime.numbers import Decay

if TYPE_CHECKING:
    import optax


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
