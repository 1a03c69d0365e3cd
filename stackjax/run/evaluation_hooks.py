"""Hooks for evaluation rows and layer rows, at intervals and when the run ends."""

import re
from collections.abc import Mapping
from typing import Any

from stackjax.data.source_metrics import of_sources
from stackjax.files.rows_file import read_rows
from stackjax.run.early_stop import Evaluation, loss_reason
from stackjax.run.hooks import Hook, StepInfo, describe_numbers
from stackjax.run.run import Run
from stackjax.run.validation import (
    BEYOND,
    LOSS,
    beyond_metrics,
    layer_metrics,
    validation_metrics,
    with_length,
)
from stackjax.runtime.agreement import from_process_0
from stackjax.training.phase import Counts, Phase


def evaluation_hooks(run: Run, phase: Phase, counts: Counts) -> list[Hook]:
    """Returns the hooks for validation metrics and layer statistics.

    A validation loss may end the stage early.

    Args:
      counts: The run's counts at the present step.
    """
    config, evaluations = run.config, _past_evaluations(run, phase, counts)
    sources = with_length(run.validation, phase.seq_len)
    phases, before = run.phases[: phase.index + 1], phase.train_start

    def evaluate(step: StepInfo) -> Mapping[str, Any]:
        values = validation_metrics(config, phase.model, sources, step.mesh, step.params)
        values |= beyond_metrics(config, phases, sources, step.mesh, step.params)
        values |= run.epochs(step.counts)
        evaluations.append((step.counts.tokens - before, values["held_out_loss"]))
        reason = loss_reason(config.stages[phase.stage].until, evaluations)
        if reason is not None:
            step.end_stage(reason)
        return values

    def measure_layers(step: StepInfo) -> Mapping[str, Any]:
        return layer_metrics(config, phases, sources, step.mesh, step.params)

    return [
        Hook(kind="evaluation", when=_is_due, on_step=evaluate, describe=_describe),
        Hook(kind="layers", when=_is_due, on_step=measure_layers),
    ]


def _is_due(step: StepInfo) -> bool:
    """Returns whether to evaluate after a step.

    No evaluation at the planned end of a stage before another: the seam evaluates the model.
    """
    if step.ends_phase and not step.ends_run and not step.stopped_early:
        following = step.run.phases[step.phase.index + 1]
        if not following.part:
            return False
    return step.ends_run or step.reaches_multiple(step.run.config.evaluation.every_tokens)


def _describe(values: Mapping[str, Any]) -> str:
    """Returns the validation losses, then any other metrics, as text."""
    losses = [f"{name} {value:.4f}" for name, value in of_sources(LOSS, values).items()]
    loss = f"held-out loss {values[LOSS]:.4f}"
    if losses:
        loss += f" ({', '.join(losses)})"
    if BEYOND in values:
        loss += f", {values[BEYOND]:.4f} beyond the old length"
    shown = re.compile(rf"{LOSS}(/.*)?|{BEYOND}(/.*)?|epochs(/.*)?")
    others = {name: value for name, value in values.items() if not shown.fullmatch(name)}
    return ", ".join(filter(None, (loss, describe_numbers(others))))


def _past_evaluations(run: Run, phase: Phase, counts: Counts) -> list[Evaluation]:
    """Returns the stage's earlier evaluations, from `metrics.jsonl`."""
    before = phase.train_start
    if counts.tokens == before:
        return []  # without reading a long file, perhaps from a bucket
    rows = from_process_0(lambda: read_rows(run.workdir))
    return [
        (row["tokens"] - before, row["held_out_loss"])
        for row in rows
        if (row["kind"], row["stage"]) == ("evaluation", phase.stage)
        and row["tokens"] <= counts.tokens
        and row["held_out_loss"] is not None
    ]
