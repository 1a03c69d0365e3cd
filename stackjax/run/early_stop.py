"""Early stopping: a stage ends at a budget, at a validation loss, or on a plateau."""

from collections.abc import Sequence

import numpy as np

from stackjax.config import EarlyStop
from stackjax.run.hooks import StepInfo
from stackjax.run.step_log import StepLog

Evaluation = tuple[int, float]
"""Tokens in the phase so far, and the validation loss."""


def budget_reason(until: EarlyStop, tokens: int, flops_6nd: int) -> str | None:
    """Returns why a stage ends at the run's tokens or FLOPs; None if training continues."""
    if until.tokens is not None and tokens >= until.tokens:
        return f"the run has trained on {until.tokens:,} tokens"
    if until.flops_6nd is not None and flops_6nd >= until.flops_6nd:
        return f"the run has spent {until.flops_6nd:.3g} FLOPs (6ND)"
    return None


def loss_reason(until: EarlyStop, evaluations: Sequence[Evaluation]) -> str | None:
    """Returns why a stage ends at the last evaluation; None if training continues."""
    loss = evaluations[-1][1]
    if until.loss is not None and loss <= until.loss:
        return f"the held-out loss is {loss:.4f}, {until.loss:g} or less"
    slope = None if until.slope_tokens is None else _slope(evaluations, until.slope_tokens)
    if until.slope is not None and slope is not None and slope < until.slope:
        return (
            f"plateau: the held-out loss falls by {slope:.3g} nats per e-fold of tokens, less "
            f"than {until.slope:g}"
        )
    return None


def end_at_budget(step: StepInfo) -> None:
    """Ends the stage if the run has reached the stage's token or FLOP budget."""
    until = step.run.config.stages[step.phase.stage].until
    reason = budget_reason(until, step.counts.tokens, step.counts.flops_6nd)
    if reason is not None:
        step.end_stage(reason)


def log_early_end(step: StepInfo, log: StepLog) -> None:
    """Writes the last rows in a stage, if the stage ended early."""
    if step.stopped_early:
        log.write_newest()
        phase, reason = step.phase, step.run.history.ended[step.phase.stage].reason
        note = f"stage {phase.stage} ended early: {reason}"
        step.write("trigger", {"reason": reason}, note)


def _slope(evaluations: Sequence[Evaluation], window: int) -> float | None:
    """Returns how far the loss falls per e-fold of tokens, by least squares over a window.

    None before the window is full.
    """
    tokens, losses = np.array(evaluations, float).T
    first = tokens[-1] - window
    inside = tokens >= first
    if tokens[0] > first or inside.sum() < 3:
        return None
    return -float(np.polyfit(np.log(tokens[inside]), losses[inside], 1)[0])
