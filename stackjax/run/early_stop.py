"""What ends a stage before its length is up: tokens, FLOPs, a loss, a plateau."""

from collections.abc import Sequence

import numpy as np

from stackjax.config import Until

Evaluation = tuple[int, float]
"""Tokens since the phase began, and the held-out loss there."""


def spent(until: Until, tokens: int, flops_6nd: int) -> str | None:
    """Returns why a stage ends at what the run has spent; None if it goes on."""
    if until.tokens is not None and tokens >= until.tokens:
        return f"the run has trained on {until.tokens:,} tokens"
    if until.flops_6nd is not None and flops_6nd >= until.flops_6nd:
        return f"the run has spent {until.flops_6nd:.3g} FLOPs (6ND)"
    return None


def settled(until: Until, evaluations: Sequence[Evaluation]) -> str | None:
    """Returns why a stage ends at its last evaluation; None if it goes on."""
    loss = evaluations[-1][1]
    if until.loss is not None and loss <= until.loss:
        return f"the held-out loss is {loss:.4f}, {until.loss:g} or less"
    fall = None if until.slope_tokens is None else _fall(evaluations, until.slope_tokens)
    if until.slope is not None and fall is not None and fall < until.slope:
        return (
            f"the held-out loss falls by {fall:.3g} nats while tokens grow e-fold, less than "
            f"{until.slope:g}"
        )
    return None


def _fall(evaluations: Sequence[Evaluation], window: int) -> float | None:
    """Returns by how much the loss falls over log tokens; None before the window is full."""
    tokens, losses = np.array(evaluations, float).T
    first = tokens[-1] - window
    if tokens[0] > first:
        return None
    inside = tokens >= first
    if inside.sum() < 3:
        return None
    return -float(np.polyfit(np.log(tokens[inside]), losses[inside], 1)[0])
