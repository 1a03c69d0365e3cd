"""Growth probes: a copy grows now, trains for a short lag, and is evaluated.

The loss right after growth predicts little; the loss after a short lag predicts much
(arXiv:2406.02469).
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax

from stackjax.config import Config
from stackjax.run.hooks import Hook, StepInfo
from stackjax.run.run import Run
from stackjax.run.summary import describe_probe
from stackjax.run.validation import model_params, validation_loss, with_length
from stackjax.runtime.errors import UserError
from stackjax.sharding.mesh import build_mesh
from stackjax.sharding.partition import move
from stackjax.training.compile import growth_key, jit_growth, step_inputs
from stackjax.training.expand import expand
from stackjax.training.phase import Phase, StepInputs
from stackjax.training.preflight import Estimate
from stackjax.training.spikes import spike_inputs
from stackjax.training.train_state import TrainState, placed


def check_probes(
    config: Config, estimates: Sequence[Estimate] = (), memory: int | None = None
) -> None:
    """Raises UserError if a probe has no growth to try, or too little memory.

    Args:
      estimates: The phases' memory on each device.
      memory: Bytes on each device, if known.
    """
    probes, phases = config.probes, expand(config)
    if probes.at_tokens and not probes.lag_tokens:
        raise UserError(
            f"probes.at_tokens is set and probes.lag_tokens is {probes.lag_tokens}; give "
            f"the number of tokens that a grown copy trains before its loss is measured."
        )
    for at in probes.at_tokens:
        phase = next((p for p in phases if p.start.tokens < at <= p.end.tokens), None)
        following = None if phase is None else _following(phases, phase)
        if phase is None or following is None or at >= following.start.tokens:
            raise UserError(
                f"probes.at_tokens has {at:,}, which is not inside a stage with growth "
                f"after it; leave it out."
            )
        if following.fit is not None:
            raise UserError(
                f"probes.at_tokens has {at:,}, but stages.{following.stage} grows by "
                f"{following.growth}, which has to be fitted first; probe another growth."
            )
        if following.average_checkpoints > 1:
            raise UserError(
                f"probes.at_tokens has {at:,}, but stages.{following.stage}."
                f"average_checkpoints is {following.average_checkpoints}, and a probe grows "
                f"from the present parameters; leave out one of them."
            )
        both = [e for i, e in enumerate(estimates) if i in (phase.index, following.index)]
        held = sum(each.state_bytes for each in both)
        held += max((each.gradient_bytes for each in both), default=0)
        if memory is not None and held > memory:
            raise UserError(
                f"probes.at_tokens has {at:,}, but both models take {held / 2**30:.1f} GiB "
                f"on each device, which has {memory / 2**30:.1f} GiB; leave the probes out."
            )


def probe_hooks(run: Run, phase: Phase) -> list[Hook]:
    """Returns the hook that probes the growth after a phase; none without probes or growth.

    A probe trains a grown copy on the next batches. The run's state and counts do not
    change. Both models are in memory at once.
    """
    config, target = run.config, _following(run.phases, phase)
    if target is None or not config.probes.at_tokens:
        return []
    mesh, grow = build_mesh(target.mesh), jit_growth(phase, target)
    num_steps = math.ceil((config.probes.lag_tokens or 0) / target.per_step.tokens)

    sources = with_length(run.validation, phase.seq_len)

    def loss(state: TrainState) -> float:
        params = model_params(target, state)
        return validation_loss(config, target.model, sources, mesh, params)

    def probe(step: StepInfo) -> dict[str, Any]:
        before = validation_loss(config, phase.model, sources, step.mesh, step.params)
        state = step.state
        if target.optimizer_state == "reset":
            state = dataclasses.replace(state, opt_state=None)
        with jax.set_mesh(mesh):
            copy = placed(target, grow(move(state, mesh), growth_key(config, target)))
            grown = loss(copy)
            train_step = run.step_of(target, None)
            if train_step is None:  # after a signal to stop
                return {}
            # Without the parts of the stage that are still to come.
            phases = expand(config, run.ended_at(phase, step.step))
            grown_phase = next(each for each in phases if each.stage == target.stage)
            inputs = _inputs(config, grown_phase)
            for batch in run.batches(target, mesh, step.counts, num_steps, phases):
                copy, _ = train_step(inputs, copy, batch)
            return {
                "loss_before": before,
                "growth": str(target.growth),
                "loss_grown": grown,
                "loss_lagged": loss(copy),
                "lag_tokens": num_steps * target.per_step.tokens,
                # Not part of the run's counts.
                "lag_flops_6nd": num_steps * target.per_step.flops_6nd,
            }

    return [Hook(kind="probe", when=_is_due, on_step=probe, describe=describe_probe)]


def _is_due(step: StepInfo) -> bool:
    """Returns whether a probe is due at this step."""
    at_tokens = step.run.config.probes.at_tokens
    return any(step.before.tokens < at <= step.counts.tokens for at in at_tokens)


def _following(phases: Sequence[Phase], phase: Phase) -> Phase | None:
    """Returns the first phase of the next stage, if it begins with growth; None in a fit."""
    later = [each for each in phases if each.stage > phase.stage]
    is_model = phase.fit is None and later and later[0].growth is not None
    return later[0] if is_model else None


def _inputs(config: Config, phase: Phase) -> StepInputs:
    """Returns the inputs of a phase's step.

    Statistics for loss spikes start anew at every step, so no step is a spike.
    """
    return step_inputs(phase, spike_inputs(config.spikes, None))
