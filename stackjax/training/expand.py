"""The phases that a run consists of: the stages of its config, with every number settled."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal

from stackjax.config import Config, Schedule, Stage
from stackjax.growth import Growth, Learn
from stackjax.growth.base import Reparameterisation
from stackjax.growth.composition import Chain
from stackjax.growth.learned import Fit
from stackjax.growth.masked import Mask
from stackjax.model.config import ModelConfig
from stackjax.model.flops import flops_6nd, matmul_flops
from stackjax.model.transformer import logical_axes
from stackjax.runtime.errors import UserError
from stackjax.training.optimizer import LearningRate
from stackjax.training.phase import Counts, Phase, Waypoint, with_births
from stackjax.training.run_position import NEW_RUN, Marker
from stackjax.training.stages import (
    parameter_rates,
    stage_lengths,
    stage_models,
    stage_steps,
    trained_layers,
)


def expand(config: Config, marker: Marker = NEW_RUN) -> tuple[Phase, ...]:
    """Returns the phases of a run.

    Args:
      marker: What the run has done that its config does not say. A stage that has ended early
        only brings the later ones forward: lengths, and the horizons of learning rates, are
        those of the config.

    Raises:
      UserError: The stages do not fit together, or with what the run has done.
    """
    if config.stages[0].growth is not None:
        raise UserError(
            "stages.0.growth is set, but there is no model before the first stage; put "
            "the growth into a later stage."
        )
    models = stage_models(config)
    run_tokens = sum(
        steps * stage.batch_size * config.data.seq_len
        for stage, steps in zip(config.stages, stage_steps(config), strict=True)
    )
    phases: list[Phase] = []
    start = Counts()
    for stage, length in enumerate(stage_lengths(config.stages)):
        end_tokens = start.tokens + length
        for name in _phase_names(config, stage):
            parts = _Parts(config, stage, name, models[max(stage - 1, 0)], models[stage])
            course = _course(parts, len(phases), start, end_tokens, marker)
            phase = _build_phase(parts, len(phases), course, run_tokens)
            phases.append(_shortened(phase, phases, marker))
            start = phases[-1].end
    return with_births(phases)


def _phase_names(config: Config, stage: int) -> tuple[Literal["fit", "train"], ...]:
    """Returns the names of the phases of a stage, in order."""
    return ("fit", "train") if isinstance(config.stages[stage].growth, Learn) else ("train",)


@dataclasses.dataclass(frozen=True)
class _Parts:
    """What the config says of a phase."""

    config: Config
    index: int
    """Of the stage."""
    name: Literal["fit", "train"]
    before: ModelConfig
    """The model of the stage before, or of this one if it is the first."""
    model: ModelConfig

    @property
    def stage(self) -> Stage:
        return self.config.stages[self.index]

    @property
    def growth(self) -> Growth | None:
        """The growth into the phase; a learned growth ends with its fit."""
        growth = self.stage.growth
        return None if isinstance(growth, Learn) and self.name == "train" else growth

    @property
    def fit(self) -> Learn | None:
        """The learned growth that the phase fits, if it does."""
        return self.growth if isinstance(self.growth, Learn) else None

    @property
    def source(self) -> ModelConfig:
        return self.before if self.growth is not None else self.model

    @property
    def trained_layers(self) -> tuple[bool, ...] | None:
        return trained_layers(self.index, self.stage, self.before, self.model)

    @property
    def per_step(self) -> Counts:
        """What a step consumes."""
        stage, seq_len, trained = self.stage, self.config.data.seq_len, self.trained_layers
        tokens, making = stage.batch_size * seq_len, 0
        if self.fit is not None:
            # Every microbatch makes the target's parameters for itself.
            axes = logical_axes(self.before)
            making = stage.accumulate * self.fit.flops(axes, self.before)
        return Counts(
            tokens=tokens,
            examples=stage.batch_size,
            flops_6nd=tokens * flops_6nd(self.model, trained) + making,
            flops=tokens * matmul_flops(self.model, seq_len, trained) + making,
        )


@dataclasses.dataclass(frozen=True)
class _Course:
    """Where a phase begins, where it is known to have been, and how many steps it has."""

    start: Counts
    waypoint: Waypoint
    num_steps: int


def _course(
    parts: _Parts, index: int, start: Counts, end_tokens: float, marker: Marker
) -> _Course:
    """Returns the course of a phase.

    Args:
      index: Position among the phases of the run.
      start: What the run has consumed before the phase.
      end_tokens: Tokens of the run at the end of the stage.
    """
    waypoint = marker.waypoints.get(index, Waypoint(step=0, counts=start))
    if index < marker.phase and index in marker.waypoints:
        return _Course(start, waypoint, waypoint.step)  # It has ended there.
    left = math.ceil((end_tokens - waypoint.counts.tokens) / parts.per_step.tokens)
    if parts.fit is not None:
        _check_fit(parts, parts.fit, left)
        return _Course(start, waypoint, parts.fit.fit_steps)
    if left < 0:
        raise UserError(
            f"stages.{parts.index} would end at {end_tokens:,.0f} tokens of the run, which has "
            f"come to {waypoint.counts.tokens:,} already; give the stage more tokens."
        )
    return _Course(start, waypoint, waypoint.step + left)


def _build_phase(parts: _Parts, index: int, course: _Course, run_tokens: int) -> Phase:
    """Returns a phase in its whole length."""
    stage, trained = parts.stage, parts.trained_layers
    phase = Phase(
        index=index,
        stage=parts.index,
        name=parts.name,
        source=parts.source,
        model=parts.model,
        growth=parts.growth,
        optimizer_state=_optimizer_state(parts),
        reparameterisations=_reparameterisations(parts),
        trained_layers=trained,
        mesh=stage.mesh or parts.config.mesh,
        batch_size=stage.batch_size,
        accumulate=stage.accumulate,
        num_steps=course.num_steps,
        learning_rate=_learning_rate(parts, course, run_tokens),
        parameter_rates=parameter_rates(stage, parts.before, trained),
        births=None,
        start=course.start,
        per_step=parts.per_step,
        waypoint=course.waypoint,
    )
    if not isinstance(stage.growth, Learn):
        _check_growth(phase)
    return phase


def _reparameterisations(parts: _Parts) -> tuple[Reparameterisation, ...]:
    if parts.fit is not None:
        return (Fit(parts.fit, parts.source),)
    return parts.growth.reparameterisations(parts.source) if parts.growth is not None else ()


def _optimizer_state(parts: _Parts) -> Literal["reset", "grow", "keep"]:
    if isinstance(parts.stage.growth, Learn):
        return "reset"
    # A model that does not grow keeps its optimizer state.
    return parts.stage.optimizer_state if parts.growth is not None else "keep"


def _shortened(phase: Phase, before: Sequence[Phase], marker: Marker) -> Phase:
    """Returns a phase as long as it was, if its stage has ended early."""
    if phase.stage not in marker.ended or phase.name == "fit":
        return phase
    fitted = sum(each.num_steps for each in before if each.stage == phase.stage)
    return dataclasses.replace(phase, num_steps=marker.ended[phase.stage].steps - fitted)


def _check_fit(parts: _Parts, growth: Learn, num_steps: int) -> None:
    """Raises UserError if a learned growth does not fit into its stage of so many steps."""
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
    if growth.fit_steps >= num_steps:
        raise UserError(
            f"{field} has {num_steps} steps, of which its growth takes "
            f"{growth.fit_steps} for the fit; give it more tokens, or fewer fit_steps."
        )


def _check_growth(phase: Phase) -> None:
    """Raises UserError where a growth does not fit into its stage."""
    if isinstance(phase.growth, Chain):
        for link in phase.growth.growths:
            if isinstance(link, Learn):
                raise UserError(
                    f"stages.{phase.stage}.growth is {phase.growth}; a learned growth stands "
                    f"alone, and grows depth and width by itself."
                )
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
    tokens = phase.end.tokens - phase.start.tokens
    for mask in phase.reparameterisations:
        if isinstance(mask, Mask) and mask.open_tokens > tokens:
            raise UserError(
                f"stages.{phase.stage} is {tokens} tokens long, and the last mask of "
                f"{phase.growth} is open after {mask.open_tokens}; lower "
                f"mask_tokens, or make the stage longer."
            )


def _learning_rate(parts: _Parts, course: _Course, run_tokens: int) -> LearningRate:
    stage, index, tokens_per_step = parts.stage, parts.index, parts.per_step.tokens
    # At step 0, if every step had the present size.
    first = course.waypoint.counts.tokens - course.waypoint.step * tokens_per_step
    first_of_phase = first - course.start.tokens
    length = first_of_phase + course.num_steps * tokens_per_step
    if parts.fit is not None:
        return LearningRate(
            peak=parts.fit.learning_rate,
            schedule=Schedule(shape="constant"),
            horizon_tokens=length,
            first_tokens=first_of_phase,
            tokens_per_step=tokens_per_step,
        )
    schedule = stage.schedule or parts.config.optimizer.schedule
    of_run = schedule.axis == "run"
    horizon = schedule.horizon_tokens
    if horizon is None:
        horizon = run_tokens if of_run else length
    if schedule.shape == "wsd" and schedule.decay_tokens is None:
        raise UserError(
            f"the schedule of stages.{index} is wsd without decay_tokens; say how many "
            f"tokens its decay takes."
        )
    if schedule.warmup_tokens + (schedule.decay_tokens or 0) > horizon:
        raise UserError(
            f"the schedule of stages.{index} warms up over {schedule.warmup_tokens} and "
            f"decays over {schedule.decay_tokens or 0} tokens, which is more than its "
            f"horizon of {horizon}."
        )
    peak = stage.peak_learning_rate
    return LearningRate(
        peak=parts.config.optimizer.peak_learning_rate if peak is None else peak,
        schedule=schedule,
        horizon_tokens=horizon,
        first_tokens=first if of_run else first_of_phase,
        tokens_per_step=tokens_per_step,
    )
