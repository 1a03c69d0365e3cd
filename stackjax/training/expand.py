"""Phases from a config's stages."""

import dataclasses
import math
from collections.abc import Sequence

from stackjax.config import Config, Stage
from stackjax.growth import OptimizerState
from stackjax.growth.base import Fit, Reparameterization
from stackjax.model.config import ModelConfig
from stackjax.runtime.errors import UserError
from stackjax.training.phase import Counts, Phase, Waypoint, with_moment_starts
from stackjax.training.phase_config import PhaseConfig
from stackjax.training.run_history import NEW_RUN, RunHistory
from stackjax.training.schedule import scheduled_rate
from stackjax.training.stages import (
    parameter_rates,
    scaled_optimizer,
    stage_lengths,
    stage_mixtures,
    stage_models,
    stage_parts,
    stage_seq_lens,
    stage_tokens,
)


def expand(config: Config, history: RunHistory = NEW_RUN) -> tuple[Phase, ...]:
    """Returns a run's phases.

    Args:
      history: The run's position. After an early end, later stages start sooner; lengths and
        learning-rate horizons stay as in the config.

    Raises:
      UserError: The stages contradict each other or the run's position.
    """
    if config.stages[0].growth is not None:
        raise UserError(
            "stages.0.growth is set, but there is no model before the first stage; put "
            "the growth into a later stage."
        )
    models = stage_models(config)
    seq_lens, mixtures = stage_seq_lens(config), stage_mixtures(config)
    run_tokens = sum(stage_tokens(config))
    phases: list[Phase] = []
    for stage, length in enumerate(stage_lengths(config.stages)):
        stage_start = _end(phases).tokens
        before = models[max(stage - 1, 0)]
        batches = stage_parts(stage, config.stages[stage], length)
        whole = batches[0]._replace(end_tokens=length)
        for fit in _fits(config, stage, before):
            phase_start = _end(phases).tokens
            for part in range(1 if fit else len(batches)):
                parts = PhaseConfig(
                    config=config,
                    index=stage,
                    fit=fit,
                    before=before,
                    model=models[stage],
                    seq_len=seq_lens[stage],
                    mixture=mixtures[stage],
                    part=part,
                    batches=(whole,) if fit else tuple(batches[part:]),
                    stage_start=stage_start,
                    train_start=phase_start,
                )
                course = _course(parts, len(phases), _end(phases), history)
                phase = _build_phase(parts, len(phases), course, run_tokens)
                phase = _shortened(phase, phases, history, is_last=not parts.batches[1:])
                if phase.num_steps > 0 or not part:
                    phases.append(phase)
    return with_moment_starts(phases)


def _end(phases: Sequence[Phase]) -> Counts:
    """Returns the counts after some phases."""
    return phases[-1].end if phases else Counts()


def _fits(config: Config, stage: int, source: ModelConfig) -> tuple[Fit | None, ...]:
    """Returns the fit of each phase in a stage, in order; None if the model trains."""
    growth = config.stages[stage].growth
    if growth is None or not growth.is_fitted:
        return (None,)
    fit = growth.fit(source)
    if fit is None:
        raise UserError(
            f"stages.{stage}.growth is {growth}; a learned growth stands alone, and grows "
            f"depth and width by itself."
        )
    return (fit, None)


@dataclasses.dataclass(frozen=True)
class _Course:
    """Start, known waypoint and step count."""

    start: Counts
    waypoint: Waypoint
    num_steps: int


def _course(parts: PhaseConfig, index: int, start: Counts, history: RunHistory) -> _Course:
    """Returns a phase's course.

    Args:
      index: Position among all phases.
      start: Counts before the phase.
    """
    waypoint = history.waypoints.get(index, Waypoint(step=0, counts=start))
    if index < history.phase and index in history.waypoints:
        return _Course(start, waypoint, waypoint.step)  # where an earlier phase ended
    end_tokens = parts.end_tokens
    left = math.ceil((end_tokens - waypoint.counts.tokens) / parts.per_step.tokens)
    if parts.fit is not None:
        _check_fit(parts, parts.fit, left)
        return _Course(start, waypoint, parts.fit.num_steps)
    if left < 0 and parts.part and waypoint.step == 0:
        left = 0  # the part before has passed this part's end, by less than a step
    if left < 0:
        raise UserError(
            f"stages.{parts.index} would end at {end_tokens:,.0f} tokens of the run, which has "
            f"come to {waypoint.counts.tokens:,} already; give the stage more tokens."
        )
    return _Course(start, waypoint, waypoint.step + left)


def _build_phase(parts: PhaseConfig, index: int, course: _Course, run_tokens: int) -> Phase:
    """Returns a phase with the planned length."""
    stage, trained = parts.stage, parts.trained_layers
    optimizer = scaled_optimizer(parts.index, stage, parts.model, parts.config.optimizer)
    phase = Phase(
        index=index,
        stage=parts.index,
        fit=parts.fit,
        source=parts.source,
        model=_with_overrides(parts.model, stage),
        growth=parts.growth,
        optimizer=parts.config.optimizer,
        optimizer_state=_optimizer_state(parts),
        average_checkpoints=stage.average_checkpoints if parts.growth is not None else 1,
        reparameterizations=_reparameterizations(parts),
        trained_layers=trained,
        mesh=stage.mesh or parts.config.mesh,
        seq_len=parts.seq_len,
        mixture=parts.mixture,
        part=parts.part,
        earlier_tokens=course.start.tokens - parts.train_start,
        batch_size=parts.batch.batch_size,
        accumulate=parts.batch.accumulate,
        moment_memory=stage.moment_memory,
        num_steps=course.num_steps,
        learning_rate=scheduled_rate(parts, course.waypoint, course.num_steps, run_tokens),
        parameter_rates=(
            None if parts.fit else parameter_rates(stage, parts.before, trained, optimizer)
        ),
        moment_starts=None,
        start=course.start,
        per_step=parts.per_step,
        waypoint=course.waypoint,
    )
    if not parts.is_fitted:
        _check_growth(phase, parts.stage_end(phase.end.tokens) - parts.train_start)
    return phase


def _with_overrides(model: ModelConfig, stage: Stage) -> ModelConfig:
    """Returns a stage's model with the stage's own positions and choices of execution."""
    return dataclasses.replace(
        model,
        remat=stage.remat or model.remat,
        loss_chunk=stage.loss_chunk or model.loss_chunk,
        rope_theta=stage.rope_theta or model.rope_theta,
        rope_scaling=stage.rope_scaling or model.rope_scaling,
    )


def _reparameterizations(parts: PhaseConfig) -> tuple[Reparameterization, ...]:
    if parts.fit is not None:
        return (parts.fit,)
    growth = parts.stage_growth
    return growth.reparameterizations(parts.before) if growth is not None else ()


def _optimizer_state(parts: PhaseConfig) -> OptimizerState:
    if parts.part:
        return "keep"
    if parts.is_fitted:
        return "reset"
    # Without growth the optimizer state is kept.
    return parts.stage.optimizer_state if parts.growth is not None else "keep"


def _shortened(
    phase: Phase, before: Sequence[Phase], history: RunHistory, is_last: bool
) -> Phase:
    """Returns a phase, shortened after an early end of its stage.

    Args:
      is_last: Whether the phase is the stage's last.
    """
    if phase.stage not in history.ended or phase.fit is not None:
        return phase
    earlier = sum(each.num_steps for each in before if each.stage == phase.stage)
    left = history.ended[phase.stage].steps - earlier
    return dataclasses.replace(phase, num_steps=left if is_last else min(left, phase.num_steps))


def _check_fit(parts: PhaseConfig, fit: Fit, num_steps: int) -> None:
    """Raises UserError if a learned growth does not fit into a stage with `num_steps`."""
    stage, field = parts.stage, f"stages.{parts.index}"
    if stage.optimizer_state != "reset":
        raise UserError(
            f"{field}.optimizer_state is {stage.optimizer_state!r}; after a "
            f"learned growth the optimizer can only be 'reset'."
        )
    if parameter_rates(stage, parts.before, parts.trained_layers) is not None:
        raise UserError(
            f"{field} has rewarm, scale_by_fan_in or train_layers, which a "
            f"learned growth does not take: all of its parameters are new."
        )
    if fit.num_steps >= num_steps:
        raise UserError(
            f"{field} has {num_steps} steps, of which its growth takes "
            f"{fit.num_steps} for the fit; give it more tokens, or fewer fit_steps."
        )


def _check_growth(phase: Phase, tokens: int) -> None:
    """Raises UserError if a growth does not fit into its stage.

    Args:
      tokens: Training tokens in the stage.
    """
    rates, maps = phase.parameter_rates, {}
    if rates is not None and phase.growth is not None:
        maps = phase.growth.axis_maps(phase.source)
        idle = {
            "rewarm": rates.rewarm and not any(each.is_new.any() for each in maps.values()),
            "scale_by_fan_in": rates.scale_by_fan_in and not maps.keys() - {"layers"},
        }
        for field in (field for field, is_idle in idle.items() if is_idle):
            raise UserError(
                f"stages.{phase.stage}.{field} is set, which has no effect while "
                f"stages.{phase.stage}.growth is {phase.growth}; leave it out."
            )
    for mask in phase.reparameterizations:
        if mask.end_tokens > tokens:
            raise UserError(
                f"stages.{phase.stage} is {tokens} tokens long, and the last mask of "
                f"{phase.growth} is open after {mask.end_tokens}; lower "
                f"mask_tokens, or make the stage longer."
            )
