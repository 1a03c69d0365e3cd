"""Routing: which experts a token has, and what keeps them equally loaded."""

import dataclasses
from typing import Annotated, Literal

from stackjax.runtime.constraints import OnlyWith, check_fields
from stackjax.runtime.numbers import NonNegative, Positive, Rate, Size


@dataclasses.dataclass(frozen=True, kw_only=True)
class Routing:
    """A router without dropped tokens: every token has its `top_k` experts.

    Router logits become scores, and the experts with the highest scores are chosen. The
    layer's output is the sum over the chosen experts' outputs, each times the expert's share.
    """

    top_k: Size
    """Experts for each token."""
    score: Literal["softmax", "sigmoid"] = "softmax"
    """Scores from logits: over all experts, or each expert alone, as in DeepSeek-V3
    (arXiv:2412.19437)."""
    normalize: bool = True
    """Whether a token's shares are divided by their sum. A softmax over the chosen logits alone
    is `softmax` with `normalize`, as in Mixtral; without, shares are the scores."""
    scale: Positive = 1.0
    """Factor for all shares."""
    balance: Literal["loss", "bias", "none"] = "loss"
    """What balances the experts' loads: a loss (arXiv:2101.03961), or for the choice a bias on
    each score, which no gradient reaches (arXiv:2408.15664)."""
    balance_weight: Annotated[Positive, OnlyWith(balance="loss")] = 0.01
    """Weight for the balance loss, which is `top_k` at equal loads."""
    bias_rate: Annotated[Rate, OnlyWith(balance="bias")] = 1e-3
    """A bias's change in a step: up for an expert below the mean load, down for one above."""
    z_loss: NonNegative = 0.0
    """Weight for the router's mean squared log-normalizer (arXiv:2202.08906)."""

    def __post_init__(self):
        check_fields(self, "model.routing")

    @property
    def architecture(self) -> "Routing":
        """The routing without the fields that only training reads."""
        plain = {"balance_weight": 0.01, "bias_rate": 1e-3, "z_loss": 0.0}
        balance = "bias" if self.balance == "bias" else "none"
        return dataclasses.replace(self, balance=balance, **plain)
